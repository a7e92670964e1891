"""Everything that knows there is more than one rank: the only home of `torch.distributed`."""
