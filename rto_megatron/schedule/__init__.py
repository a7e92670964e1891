"""What runs next, where, and how long it takes: the policy that decides, and the simulator that asks it."""
