"""What the daemon says of its store's files, when it opens and when it closes them."""

import shutil
from pathlib import Path

import structlog
from structlog.testing import capture_logs

from pocd.daemon.daemon import _open_outbox
from pocd.store.outbox import Outbox


def test_files_that_a_person_has_to_look_after_are_logged(tmp_path: Path) -> None:
    path, backup = tmp_path / "folder" / "outbox.db", tmp_path / "folder" / "backup.db"
    Outbox.open(path).close()
    shutil.copy(path, backup)
    log = structlog.get_logger()
    path.parent.chmod(0o777)
    with capture_logs() as entries, _open_outbox(path, log):
        backup.rename(path)
    assert [entry["action"] for entry in entries] == ["store_exposed", "store_saved"]
    copy = path.with_name("outbox.db.saved-1")
    assert f"pocd outbox restore {copy}" in entries[1]["remedy"]

    path.parent.chmod(0o700)
    with capture_logs() as entries, _open_outbox(path, log):
        pass
    assert [(entry["action"], entry["file"]) for entry in entries] == [("store_aside", str(copy))]
