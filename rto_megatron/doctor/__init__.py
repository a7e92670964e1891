"""What is wrong with a run, or will be, told before anything is queued: no GPU, no other ranks, nothing written."""
