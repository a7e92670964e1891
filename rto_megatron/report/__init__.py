"""What a run did, for people: pages drawn from the files in its folder."""
