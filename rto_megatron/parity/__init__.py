"""Proof that a layout does what one process does: `parity`."""
