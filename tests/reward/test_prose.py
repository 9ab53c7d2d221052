import pytest

from megatron_r1.reward.prose import prose


@pytest.mark.parametrize(
    "text",
    [
        "$x^2 + y$",
        "$$\\int_0^1 f(x)\\,dx$$",
        "\\(a_n\\)",
        "\\[ \\det A = ad - bc \\]",
        "\\begin{align*} x &= 1 \\\\ y &= 2 \\end{align*}",
        "$f(x) = 3 \\text{ if } x > 0$",
        "`sorted(values, key=len)`",
        "```python\ndef f(n):\n    return n * f(n - 1)\n```",
        "```\nfor i in range(3):\n    print(i)  # never closed",
        "https://example.org/some/long/path?with=words",
        "<think></answer><br/>",
        "somebody@example.org",
        "\\alpha \\leq \\frac",
    ],
)
def test_no_prose(text: str) -> None:
    opened, hidden = prose(f"before {text}\n")
    assert opened.split() == ["before"]
    assert not hidden


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("$\\text{all of this is only text}$", "all of this is only text"),
        ("\\[\\text{先把两个数加起来再除以二}\\]", "先把两个数加起来再除以二"),
        ("`so this is how I really think`", "so this is how I really think"),
        ("```\nFirst we add the two\nand then we halve it\n```", "First we add the two\nand then we halve it"),
        ("```python\nx = 1\n# 先把两个数加起来\n# 然后再除以二\n# 最后比较大小\n```", "# 先把两个数加起来"),
        ("It costs $5 and the other one costs $7", "and the other one costs"),
    ],
)
def test_sentences_are_found_where_they_do_not_belong(text: str, hidden: str) -> None:
    assert hidden in prose(text).hidden
    assert hidden not in prose(text).open


def test_comments_within_code_are_code() -> None:
    code = "```python\ntotal = 0  # 先把总数设为零\nfor x in xs:\n    total += x\n```"
    assert prose(code) == ("\n", "")


def test_letters_as_they_look() -> None:
    assert prose("ｆｕｌｌ 𝓯𝓪𝓷𝓬𝔂 ze\u200bro a\u0336b\u0336").open == "full fancy zero ab"


def test_a_ligature_of_a_sentence_does_not_multiply_the_text() -> None:
    assert len(prose("\ufdfa" * 1000).open) == 1000
