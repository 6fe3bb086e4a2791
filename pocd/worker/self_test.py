"""What a worker does before it is trusted: known distances, and the configured model in the shape that will be used."""

def self_test(model: Model, load: Load, batch_size: int) -> None:
    """Run the model once in the shape that will be used, and check that it answers the same twice.

    Raises:
        NonFiniteError: It gave NaN or infinity.
        OutOfMemoryError: The batch does not fit.
        ComputeError: Two answers to one nonce differ.
    """
    scheme = SCHEMES[load.scheme]
    with block_run(model, scheme, block_hash="self-test", public_key="self-test", seq_len=load.seq_len) as run:
        together = run.distances(range(batch_size), batch_size=batch_size)
        alone = run.distances([batch_size - 1], batch_size=batch_size)
    if abs(together[-1] - alone[0]) > default_tolerance(load.dtype, scheme, model.hidden_size):
        raise ComputeError(
            f"the self-test of {load.model!r} failed: nonce {batch_size - 1} has distance {together[-1]} "
            f"in a batch and {alone[0]} alone; the device computes wrongly"
        )
