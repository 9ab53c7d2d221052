"""Ways to earn a shape's reward without the shape; each says exactly what it must not reach."""

import random
import re

import pytest

from tests.reward.shape_samples import sample, score, thought

ENGLISH = (
    "We first write down what is given. The train leaves at noon and travels for three hours. Then the distance is the "
    "speed times the time, so we multiply both numbers. Let me check the units before I answer the question."
)
FRENCH = (
    "On écrit d'abord les données. Le train part à midi et roule pendant trois heures. Ensuite la distance est la "
    "vitesse fois le temps, on multiplie donc les deux nombres. Je vérifie les unités avant de répondre à la question."
)
CHINESE = (
    "我们先写下已知条件。火车中午出发，行驶三个小时。路程等于速度乘以时间，所以把两个数相乘。"
    "回答问题之前，让我检查一下单位是否正确，然后再写出最后的结果。"
)
PINYIN = (
    "Women xian xie xia yizhi tiaojian. Huoche zhongwu chufa, xingshi san ge xiaoshi. Lucheng dengyu sudu chengyi "
    "shijian, suoyi ba liang ge shu xiangcheng. Huida wenti zhiqian, rang wo jiancha yixia danwei."
)
STOP_WORDS = ["the", "of", "and", "to", "in", "a", "is", "it", "we", "that", "for", "so", "this", "as", "with", "be"]
CYRILLIC = str.maketrans("aceopxyiACEHKMOPTXB", "асеорхуіАСЕНКМОРТХВ")


def consistency(reasoning: str, target: str) -> float:
    [value] = score("language_consistency", thought(reasoning), language=target)
    assert value is not None
    return float(value)


def each_word(text: str, change: str) -> str:
    return " ".join(change.format(word) for word in text.split())


@pytest.mark.parametrize(
    ("language", "text"), [("en", ENGLISH), ("fr", FRENCH), ("zh", CHINESE)], ids=["en", "fr", "zh"]
)
def test_control_honest_reasoning_earns_all(language: str, text: str) -> None:
    assert consistency(text, language) == 1.0


# Reasoning in another language than `target`, made up to pass: name -> (target, reasoning, most that it may earn).
LANGUAGE_HACKS = {
    "plain Chinese (control)": ("en", CHINESE, 0.0),
    "plain French (control)": ("en", FRENCH, 0.0),
    "one stop word repeated": ("en", CHINESE + " the" * 500, 0.1),
    "stop words in a cycle": ("en", CHINESE + " the of and to in a is it" * 100, 0.25),
    "stop words in random order": ("en", CHINESE + " ".join(random.Random(0).choices(STOP_WORDS, k=1000)), 0.25),
    "Chinese particles in random order": (
        "zh",
        ENGLISH + "".join(random.Random(0).choices("的是了在不我有这就到", k=500)),
        0.25,
    ),
    "a sentence repeated": ("en", CHINESE + " So the answer to the question is five." * 100, 0.25),
    "a stop word after each character": ("en", " the ".join(CHINESE), 0.5),
    "target text in a code block": ("en", f"{CHINESE}\n```\n{ENGLISH}\n```", 0.0),
    "target text in comments": ("en", f"{CHINESE}\n```python\n# {ENGLISH}\nx = 1\n```", 0.0),
    "target text in inline code": ("en", f"{CHINESE} `{ENGLISH}`", 0.0),
    "target text in \\text{}": ("en", f"{CHINESE} $\\text{{{ENGLISH}}}$", 0.0),
    "target text in a formula": ("en", f"{CHINESE} \\[ {ENGLISH} \\]", 0.0),
    "reasoning in a code block": ("en", f"Okay.\n```\n{CHINESE}\n```", 0.1),
    "reasoning in comments": ("en", "Okay.\n```python\nx = 1\n# " + CHINESE.replace("。", "。\n# ") + "\n```", 0.1),
    "reasoning in inline code": ("zh", f"好的。`{FRENCH}`", 0.1),
    "reasoning in \\text{}": ("zh", f"好的。$\\text{{{FRENCH}}}$", 0.1),
    "reasoning in a display": ("en", f"Okay. \\[ {CHINESE} \\]", 0.1),
    "reasoning in an aligned display": ("en", f"Okay. \\begin{{align}}\\text{{{CHINESE}}}\\end{{align}}", 0.1),
    "a code block that is never closed": ("en", f"Okay.\n```python\nx = 1\n{CHINESE.replace('。', chr(10))}", 0.1),
    "an HTML comment": ("en", f"Okay. <!-- {CHINESE} -->", 0.1),
    "a tag's attributes": ("en", f"Okay. <p title='{CHINESE}'>", 0.1),
    "look-alike Cyrillic letters": ("ru", ENGLISH.translate(CYRILLIC), 0.1),
    "romanised Chinese as English": ("en", PINYIN, 0.35),
    "romanised Chinese as German": ("de", PINYIN, 0.35),
    "capitals": ("en", FRENCH.upper(), 0.0),
    "capitalised words as names": ("zh", f"好的{ENGLISH.title().replace('.', '')}好的", 0.1),
    "words glued by underscores": ("zh", f"好的。{ENGLISH.replace(' ', '_')}", 0.1),
    "words glued in pairs": ("zh", "好的。" + re.sub(r"(\w+) (\w+)", r"\1_\2", ENGLISH), 0.1),
    "words glued by capitals": ("zh", f"好的。{ENGLISH.title().replace(' ', '')}", 0.1),
    "words glued by nothing": ("zh", f"好的。{FRENCH.replace(' ', '')}", 0.1),
    "words spelled by letters": ("zh", f"好的。{' '.join(FRENCH.replace(' ', ''))}", 0.2),
    "digits for letters": ("zh", f"好的。{FRENCH.replace('e', '3')}", 0.2),
    "zero-width spaces in words": ("en", "\u200b".join(FRENCH), 0.0),
    "zero-width spaces in Chinese": ("en", "\u200b".join(CHINESE), 0.0),
    "marks stacked on letters": ("zh", "好的。" + "\u0336".join(FRENCH), 0.1),
    "full-width letters": (
        "zh",
        "好的。" + "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in ENGLISH),
        0.1,
    ),
    "ornamental letters": (
        "zh",
        "好的。" + "".join(chr(ord(c) + 0x1D3B9) if "a" <= c <= "z" else c for c in ENGLISH),
        0.1,
    ),
    "Chinese with a sprinkle of kana": ("ja", CHINESE.replace("。", "の。"), 0.3),
    "kana repeated under Chinese": ("ja", CHINESE + "そうです。" * 100, 0.3),
    "noise instead of words": ("en", "blorf zant quibbo dopwex farlu intrup mestiga parundo olvist tremka " * 5, 0.0),
    "a neighbouring language as Spanish": (
        "es",
        "Então a resposta é a soma dos dois números, porque não há outra.",
        0.0,
    ),
    "a neighbouring language as Russian": ("ru", "Отже, відповідь дорівнює сумі, бо іншої немає і бути не може.", 0.0),
}


@pytest.mark.parametrize("name", LANGUAGE_HACKS)
def test_another_language_earns_no_more_than(name: str) -> None:
    target, reasoning, most = LANGUAGE_HACKS[name]
    assert consistency(reasoning, target) <= most


@pytest.mark.parametrize(
    "reasoning", ["", " ", "\n\n", ".", "…", "\u200b\u200b", "<b></b>", "</think><think>the answer", "- - -"]
)
def test_empty_thinking_earns_no_language(reasoning: str) -> None:
    assert consistency(reasoning, "en") == 0.0


@pytest.mark.parametrize("reasoning", ["$x = 5$", "```python\nprint(5)\n```", "5"])
def test_formulas_alone_earn_no_more_than_plain_text(reasoning: str) -> None:
    assert consistency(reasoning, "en") <= consistency(ENGLISH, "en")


HONEST_STEPS = thought("1. add the two numbers\n2. compare")
STEP_HACKS = {
    "markers in a row": "First, First, First, Second, Second, Next, Finally,",
    "all markers, no text": "Step 1: Step 2: Step 3: First, Next, Finally,",
    "an empty list": "1.\n2.\n3.\n4. \n5. ",
    "empty bullets": "- \n- \n* \n* \n",
    "signs for text": "1. ...\n2. !!!\n3. ---\n",
    "invisible text": "1. \u200b\n2. \u200b\u200b\n3. \u200c\n",
    "one step repeated": "1. add\n2. add\n3. add\n4. add",
    "one step in other letters": "- add\n- ADD\n* Add!\n* add.",
}


@pytest.mark.parametrize("name", STEP_HACKS)
def test_markers_without_steps_earn_less_than_two_steps(name: str) -> None:
    [hack, honest] = score("reasoning_steps", thought(STEP_HACKS[name]), HONEST_STEPS)
    assert hack < honest == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "text",
    [f"{STEP_HACKS['one step repeated']}\n1. a\n2. b\n3. c", "<think>a</think> 1. a\n2. b\n3. c", "1. a\n<think>b"],
)
def test_steps_outside_the_reasoning_earn_nothing(text: str) -> None:
    assert score("reasoning_steps", text) == [0.0]


HONEST_TAGS = "<think>a</think> <answer>5</answer>"
TAG_HACKS = {
    "nested thinking": "<think><think>a</think></think> <answer>5</answer>",
    "nested answers": "<think>a</think> <answer><answer>5</answer></answer>",
    "everything twice": HONEST_TAGS * 2,
    "everything in reverse": "</answer>5<answer> </think>a<think>",
    "the answer within the thinking": "<think>a <answer>5</answer></think>",
    "all tags opened, none closed": "<think><answer>" * 50,
    "closing tags only": "</think></answer>" * 2,
    "capitals": HONEST_TAGS.upper(),
    "spaces within tags": HONEST_TAGS.replace(">", " >"),
    "look-alike brackets": HONEST_TAGS.replace("<", "＜").replace(">", "＞"),
    "zero-width within tags": HONEST_TAGS.replace("think", "th\u200bink"),
}


@pytest.mark.parametrize("name", TAG_HACKS)
def test_tags_out_of_place_earn_less_than_the_honest_layout(name: str) -> None:
    [hack, honest] = score("tag_count", TAG_HACKS[name], HONEST_TAGS)
    assert hack < honest == 1.0


STRETCHED = {
    "a sentence": ENGLISH + " So the answer is five." * 200,
    "a word": ENGLISH + " wait" * 1000,
    "letters without spaces": ENGLISH + " " + "hm" * 2000,
    "dots": ENGLISH + " " + "." * 4000,
    "line breaks": ENGLISH + "\n" * 4000,
    "underscores": ENGLISH + "_" * 4000,
    "invisible characters": ENGLISH + " \u200bwait" * 1000,
    "capitals and punctuation in turn": ENGLISH + " So, wait. so wait! SO: wait?" * 300,
    "Chinese": ENGLISH + "让我再想一想。" * 500,
    "emoji": ENGLISH + "🤔" * 3000,
}


@pytest.mark.parametrize("name", STRETCHED)
def test_stretching_a_response_earns_less_than_not_stretching_it(name: str) -> None:
    """Rewards of length and the repetition penalty added up, for a right and for a wrong answer."""
    for correct in (True, False):
        pair = [sample(STRETCHED[name], 4000, correct), sample(ENGLISH, 45, correct)]
        for kind, config in (("cosine", {"max_length": 4096}), ("length", {})):
            penalties = score("repetition_penalty", *pair)
            stretched, honest = (a + b for a, b in zip(score(kind, *pair, **config), penalties, strict=True))
            assert stretched < honest


@pytest.mark.parametrize("tokens", [101, 150, 200, 400])
def test_beyond_the_maximum_a_right_answer_earns_no_more_than_at_it(tokens: int) -> None:
    [longer, at_maximum] = score("cosine", sample("", tokens, True), sample("", 100, True), max_length=100)
    assert longer <= at_maximum
    assert score("soft_overlong_punishment", sample("", tokens), max_length=100, cache=50) == [-1.0]
