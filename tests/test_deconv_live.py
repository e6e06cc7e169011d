import json

import numpy as np
from matplotlib.colors import to_rgb

from deconv import class_colours, page_json, text_colour_on


def luminance(colour: str) -> float:
    values = np.array(to_rgb(colour))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_text_on_class_colours_is_readable() -> None:
    for colour in class_colours(10):
        low, high = sorted((luminance(colour), luminance(text_colour_on(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert text_colour_on("#ffffff") == "#000" and text_colour_on("#000000") == "#fff"


def test_json_in_a_page_is_never_read_as_html() -> None:
    content = {"</script><b>": ["<!--", np.nan, np.float32(1 / 3), np.int64(7), np.bool_(True), None]}
    text = page_json(content)
    assert "<" not in text
    assert json.loads(text) == {"</script><b>": ["<!--", None, 0.33333, 7, True, None]}
