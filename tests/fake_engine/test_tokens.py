from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpcserve.engines.fake_server import tokens


@given(st.text())
def test_decoding_gives_the_text_back(text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=4))
def test_a_conversation_starts_with_the_tokens_of_its_earlier_turns(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    earlier = tokens.encode(tokens.chat_prompt(messages[:-1], add_generation_prompt=False))
    whole = tokens.encode(tokens.chat_prompt(messages))
    assert whole[: len(earlier)] == earlier


def test_all_ids_are_below_the_vocabulary_size() -> None:
    assert max(tokens.encode("\U0010ffff" * 3 + "ÿÿÿ")) < tokens.VOCABULARY_SIZE


def test_special_tokens_are_recognised_and_can_be_left_out() -> None:
    ids = tokens.encode("a<|im_end|>\n")
    assert tokens.EOS in ids
    assert tokens.decode(ids) == "a<|im_end|>\n"
    assert tokens.decode(ids, special=False) == "a\n"


def test_continuing_the_final_message_leaves_it_open() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " ka"}]
    prompt = tokens.chat_prompt(messages, add_generation_prompt=False, continue_final_message=True)
    opening = tokens.chat_prompt(messages[:1])
    assert prompt == opening + " ka"
    assert tokens.encode(prompt) == tokens.encode(opening) + tokens.encode(" ka")
