"""The chat templates, letter by letter."""

import pytest

from emoverse.data.prompt import SYSTEM_TEXT, build_answer, build_prompt, chat_template


def whole(segments: list[str | int]) -> str:
    return "".join(s if isinstance(s, str) else "<IMG_CONTEXT>" * s for s in segments)


def test_phi3_clip() -> None:
    segments = build_prompt(
        "QUERY", num_frames=2, tokens_per_frame=3, view="clip", template="phi3-chat"
    )
    assert segments == [
        f"<|system|>\n{SYSTEM_TEXT}<|end|><|user|>\nFrame1: <img>",
        3,
        "</img>\nFrame2: <img>",
        3,
        "</img>\nQUERY<|end|><|assistant|>\n",
    ]
    assert SYSTEM_TEXT == "You are an sentiment and emotion analysis expert."
    assert build_answer("Positive.", template="phi3-chat") == "Positive.<|end|>"


def test_internlm2_image_with_tiles() -> None:
    segments = build_prompt(
        "QUERY", num_frames=3, tokens_per_frame=2, view="peak", template="internlm2-chat"
    )
    assert segments == [
        f"<|im_start|>system\n{SYSTEM_TEXT}<|im_end|><|im_start|>user\n<img>",
        6,
        "</img>\nQUERY<|im_end|><|im_start|>assistant\n",
    ]
    assert build_answer("", template="internlm2-chat") == "<|im_end|>"


@pytest.mark.parametrize("template", ["phi3-chat", "internlm2-chat"])
def test_text_only(template: str) -> None:
    segments = build_prompt(
        "QUERY", num_frames=0, tokens_per_frame=2, view="none", template=template, system="S"
    )
    assert len(segments) == 1
    assert "QUERY" in whole(segments)
    assert "<img>" not in whole(segments)


def test_no_newline_behind_end_tokens() -> None:
    for template, end in (("phi3-chat", "<|end|>"), ("internlm2-chat", "<|im_end|>")):
        text = whole(
            build_prompt("Q", num_frames=8, tokens_per_frame=1, view="clip", template=template)
        )
        assert f"{end}\n" not in text
        assert text.count("<img>") == text.count("</img>\n") == 8
        assert chat_template(template).end == end


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must be one of .*phi3-chat.*, found 'Hermes-2'"):
        chat_template("Hermes-2")
    for view, frames in (("none", 1), ("clip", 0)):
        with pytest.raises(ValueError, match=f"view '{view}' cannot have {frames} frames"):
            build_prompt(
                "Q", num_frames=frames, tokens_per_frame=1, view=view, template="phi3-chat"
            )
    with pytest.raises(ValueError, match="the query contains the tag <video>"):
        build_prompt(
            "a <video> b", num_frames=1, tokens_per_frame=1, view="clip", template="phi3-chat"
        )
