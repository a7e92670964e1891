"""Small evaluations, written by hand."""

from rto_megatron.credit.record import Evaluation, Response

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "quotes ' \" ` {{ 7 * 7 }} ${document.title = 'owned'}",
    "nul \0 bell \x07 escape \x1b[31m return \r",
    "left \u202egnp.exe\u202c right",
    "half \ud83d of a character",
    "&lt;b&gt; &amp; <b>bold</b>",
    "]]> --> <!-- \u2028 \u2029",
]
"""Texts that have broken pages."""


def response(index: int = 0, pieces=("I", " am", " fine"), *, size: float = 0.01, **more) -> Response:
    """Columns of a run with all roles; token i earns `size` times i, with alternating signs."""
    sign = [size * i * (-1) ** i for i in range(len(pieces))]
    columns = {
        "dpo": sign,
        "kl": [-0.001] * len(pieces),
        "reward": [value - 0.001 for value in sign],
        "value": [0.25 + 0.1 * i for i in range(len(pieces))],
        "advantage": [0.5 - 0.1 * i for i in range(len(pieces))],
        "dpo_log_ratio": [20 * value for value in sign],
        "log_ratio": [0.1] * len(pieces),
        "log_prob": [-1.5] * len(pieces),
    }
    given = {"prompt": f"How are you? {index}", "specials": [], "score": 1.5, "truncated": False, "columns": columns}
    return Response(index=index, pieces=list(pieces), **(given | more))


def evaluation(step: int = 0, responses=None, **more) -> Evaluation:
    """The evaluation before a step."""
    responses = [response()] if responses is None else responses
    given = {
        "name": f"step {step}",
        "num_prompts": len(responses),
        "coefs": {"dpo_coef": 0.05, "kl_coef": 0.01, "score_coef": 1.0},
    }
    return Evaluation(step=step, responses=responses, **(given | more))
