"""Token credit for people: what every token of a held-out response earned, stored and drawn as a page."""
