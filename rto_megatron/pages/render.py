"""A template and its values as one HTML page that stands alone."""

from pathlib import Path
from typing import Any

import jinja2

HOUSE = Path(__file__).parent
"""Where templates find what they include: `house.html`, with which all pages begin; each says its `kind`."""


def render(template: Path, **values: Any) -> str:
    """The page; texts among `values` are escaped, and `| tojson` writes compact JSON that no text can break out of."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HOUSE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template.name).render(**values)


def visible(text: str) -> str:
    """Text in which nothing hides and nothing turns what stands beside it around.

    Control characters become their pictures, and marks that reorder or hide text become their numbers. Letters of all
    scripts stay, and so do the joiners that emoji and Persian need, the two selectors that say whether a sign is an
    emoji, line feeds and tabs.
    """
    return text.translate(_VISIBLE)


_VISIBLE = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | {
        code: f"\u27e8U+{code:04X}\u27e9"
        for code in (
            *range(0x80, 0xA0),
            0x00AD,
            0x034F,
            0x061C,
            0x115F,
            0x1160,
            *range(0x17B4, 0x17B6),
            *range(0x180B, 0x1810),
            0x200B,
            0x200E,
            0x200F,
            *range(0x2028, 0x202F),
            *range(0x2060, 0x2070),
            0x3164,
            *range(0xFE00, 0xFE0E),
            0xFEFF,
            0xFFA0,
            *range(0xFFF9, 0xFFFC),
            *range(0x1D173, 0x1D17B),
            *range(0xE0000, 0xE0080),
            *range(0xE0100, 0xE01F0),
        )
    }
    | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
)
"""Character -> what is shown of it; halves of characters cannot be written into a file."""
