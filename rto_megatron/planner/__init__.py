"""What a run will take before it is queued: `plan` chooses map and layouts, `simulate` times the steps of a config."""
