"""Graders that the tests name."""


def shortness(prompts, responses):
    """The fewer characters the better."""
    return [-len(response) for _, response in zip(prompts, responses, strict=True)]


def too_few(prompts, responses):
    """A grade for the first response only."""
    return [1.0]


def not_finite(prompts, responses):
    """No number for anything."""
    return [float("nan")] * len(responses)


def fails(prompts, responses):
    """As a service that is down."""
    raise TimeoutError("the judge does not answer")
