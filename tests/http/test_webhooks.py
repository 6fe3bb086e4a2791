"""Signatures agree with the reference implementation, and nothing but the signed message passes."""

import base64
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from pocd.http.webhooks import SecretError, SignatureError, WebhookKeys, is_message_id, unsigned_headers

OLD = "whsec_" + base64.b64encode(b"old key, of 24 bytes....").decode()
NEW = "whsec_" + base64.b64encode(b"new key, of 32 bytes............").decode()
BODY = b'{"nonces":[1,2,3]}'
NOW = 1_700_000_000

message_ids = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="."), min_size=1, max_size=256
)
json_bodies = st.dictionaries(st.text(), st.lists(st.integers() | st.text())).map(
    lambda value: json.dumps(value, ensure_ascii=False).encode()
)


@given(message_id=message_ids, body=json_bodies)
def test_reference_verifies_ours(message_id: str, body: bytes) -> None:
    headers = WebhookKeys.parse(NEW).headers(message_id, int(time.time()), body)
    Webhook(NEW).verify(body, headers)


@given(message_id=message_ids, text=st.text(), now=st.integers(0, 2**33))
def test_ours_verifies_reference(message_id: str, text: str, now: int) -> None:
    signature = Webhook(NEW).sign(message_id, datetime.fromtimestamp(now, UTC), text)
    headers = unsigned_headers(message_id, now) | {"webhook-signature": signature}
    WebhookKeys.parse(NEW).verify(headers, text.encode(), now)


@given(message_id=message_ids, body=st.binary(), key=st.binary(min_size=16, max_size=64))
def test_any_bytes_and_key_pass_and_another_key_fails(message_id: str, body: bytes, key: bytes) -> None:
    secret = base64.b64encode(key).decode()
    headers = WebhookKeys.parse(secret).headers(message_id, NOW, body)
    WebhookKeys.parse(secret).verify(headers, body, NOW)
    other = base64.b64encode(bytes([key[0] ^ 1]) + key[1:]).decode()
    with pytest.raises(SignatureError, match="no signature matches"):
        WebhookKeys.parse(other).verify(headers, body, NOW)


def test_example_of_the_specification() -> None:
    """The numbers are of Svix's documentation, where Standard Webhooks come from."""
    keys = WebhookKeys.parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = keys.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_rotation_signs_with_every_key() -> None:
    both = WebhookKeys.parse(f"{OLD}\n{NEW}\n")
    headers = both.headers("a", int(time.time()), BODY)
    assert headers["webhook-signature"].count("v1,") == 2
    for secret in (OLD, NEW):
        Webhook(secret).verify(BODY, headers)
        WebhookKeys.parse(secret).verify(headers, BODY, time.time())
        both.verify(WebhookKeys.parse(secret).headers("a", NOW, BODY), BODY, NOW)


def test_other_versions_are_passed_over() -> None:
    keys = WebhookKeys.parse(NEW)
    headers = keys.headers("a", NOW, BODY)
    keys.verify(headers | {"webhook-signature": "v1a,abc v2,def " + headers["webhook-signature"]}, BODY, NOW)


def _tampered(headers: dict[str, str], name: str, value: str) -> dict[str, str]:
    assert headers[name] != value
    return headers | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("webhook-id", "b", "no signature matches"),
        ("webhook-timestamp", str(NOW + 1), "no signature matches"),
        ("webhook-timestamp", f"0{NOW}", "no signature matches"),
        ("webhook-signature", "v1,", "no signature matches"),
        ("webhook-signature", "v1,\udcff", "no signature matches"),
        ("webhook-signature", "v1," + base64.b64encode(bytes(32)).decode(), "no signature matches"),
        ("webhook-signature", "v2,abc", "webhook-signature is malformed"),
        ("webhook-id", "a.1", "webhook-id is malformed"),
        ("webhook-id", "a b", "webhook-id is malformed"),
        ("webhook-id", "\udcff", "webhook-id is malformed"),
        ("webhook-timestamp", "soon", "webhook-timestamp is malformed"),
        ("webhook-timestamp", "-1", "webhook-timestamp is malformed"),
        ("webhook-timestamp", f"{NOW}.0", "webhook-timestamp is malformed"),
        ("webhook-timestamp", "1" * 5000, "webhook-timestamp is malformed"),
        ("webhook-timestamp", str(NOW - 301), "more than 300 s"),
        ("webhook-timestamp", str(NOW + 301), "more than 300 s"),
        ("webhook-id", "", "webhook-id is missing"),
    ],
)
def test_each_tampered_header_is_refused(name: str, value: str, reason: str) -> None:
    keys = WebhookKeys.parse(NEW)
    headers = _tampered(keys.headers("a", NOW, BODY), name, value)
    with pytest.raises(SignatureError, match=reason):
        keys.verify(headers, BODY, NOW)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_each_missing_header_is_named(name: str) -> None:
    keys = WebhookKeys.parse(NEW)
    headers = keys.headers("a", NOW, BODY)
    del headers[name]
    with pytest.raises(SignatureError, match=f"{name} is missing"):
        keys.verify(headers, BODY, NOW)


@given(body=st.binary(min_size=1), data=st.data())
def test_any_flipped_bit_of_the_body_is_refused(body: bytes, data: st.DataObject) -> None:
    keys = WebhookKeys.parse(NEW)
    headers = keys.headers("a", NOW, body)
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SignatureError, match="no signature matches"):
        keys.verify(headers, bytes(changed), NOW)


@pytest.mark.parametrize("now", [NOW - 300, NOW + 300])
def test_300_seconds_are_near_enough(now: int) -> None:
    keys = WebhookKeys.parse(NEW)
    keys.verify(keys.headers("a", NOW, BODY), BODY, now)


@pytest.mark.parametrize("message_id", ["", "a.b", "a b", "a\r\nx: y", "é", "a" * 257])
def test_an_id_that_cannot_be_sent_is_refused(message_id: str) -> None:
    assert not is_message_id(message_id)
    with pytest.raises(ValueError, match="cannot be a webhook-id"):
        WebhookKeys.parse(NEW).headers(message_id, NOW, BODY)


def test_unsigned_headers_hold_no_signature() -> None:
    assert unsigned_headers("a", NOW) == {"webhook-id": "a", "webhook-timestamp": "1700000000"}


def test_secret_file_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_bytes(f"# rotated in May\r\n\r\n  {OLD}  \r\n{NEW.removeprefix('whsec_').rstrip('=')}".encode())
    assert WebhookKeys.from_file(path) == WebhookKeys.parse(f"{OLD}\n{NEW}")


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (f"{OLD}\nwhsec_not-base64-Zg1c9\n".encode(), "line 2: is not base64"),
        (b"whsec_\xc3\xa9" + b"Zg1c9" * 9, "line 1: is not base64"),
        (f"{OLD} {NEW}".encode(), "line 1: is not base64"),
        (b"# short\nwhsec_" + base64.b64encode(b"Zg1c9 15 bytes."), "line 2: 15 bytes are too few"),
        (b"", "holds no secret"),
        (b"\n# only words\n", "holds no secret"),
        (b"whsec_Zg1c9\xff", "is not UTF-8 text"),
    ],
)
def test_a_bad_secret_file_is_named_but_not_shown(tmp_path: Path, content: bytes, where: str) -> None:
    path = tmp_path / "secrets"
    path.write_bytes(content)
    with pytest.raises(SecretError, match=where) as caught:
        WebhookKeys.from_file(path)
    assert str(path) in str(caught.value)
    # A traceback shows the causes too, unless they are suppressed.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for word in content.decode(errors="replace").split():
        if word.startswith("whsec_"):
            assert word.removeprefix("whsec_") not in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "."])
def test_an_unreadable_secret_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SecretError, match="cannot be read") as caught:
        WebhookKeys.from_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_keys_are_never_printed() -> None:
    keys = WebhookKeys.parse(f"{OLD}\n{NEW}")
    for text in (repr(keys), str(keys), f"{keys}"):
        assert "key, of" not in text
        assert not any(secret.removeprefix("whsec_") in text for secret in (OLD, NEW))


def test_reference_refuses_what_we_signed_with_another_key() -> None:
    """The reference does look at our signatures: the agreement above is no accident."""
    with pytest.raises(WebhookVerificationError):
        Webhook(OLD).verify(BODY, WebhookKeys.parse(NEW).headers("a", int(time.time()), BODY))
