"""Files of prompts as editors write them: only line feeds end a line."""

from uoe_jax.cli.generate import read_prompts


def test_a_mark_of_byte_order_and_separators_in_a_text_are_no_fault(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}'.encode())
    assert [r["prompt"] for r in read_prompts(file)] == ["a\u2028b\x85c", "d"]
