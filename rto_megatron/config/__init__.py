"""Frozen dataclasses, one YAML file a run, tyro on the command line. Imports no torch."""
