import pytest

from dipper.chat import Conversation
from dipper.errors import ConfigError
from dipper.generate import Sampling
from fakes import EOS, FakeEngine, FakeTokenizer

TOKENIZER = FakeTokenizer()


def conversation(script, **options):
    engine = FakeEngine([*TOKENIZER.ids(script), EOS], context=options.pop("context", 64))
    return Conversation(engine, TOKENIZER, **options), engine


def say(chat, text, n=20, **options):
    return "".join(step.text for step in chat.send(text, max_new_tokens=n, **options))


def prefills(engine):
    return [call[1] for call in engine.calls if call[0] == "prefill"]


def test_a_second_turn_prefills_only_what_is_new():
    chat, engine = conversation("ok")
    assert say(chat, "hi") == "ok"
    assert say(chat, "yo") == "ok"
    first, second = prefills(engine)
    assert first == TOKENIZER.ids("u hi a ")
    # The end-of-text token was said but never fed back, so it is new.
    assert second == [EOS, *TOKENIZER.ids("u yo a ")]
    assert not chat.was_reset
    assert [m["content"] for m in chat.messages] == ["hi", "ok", "yo", "ok"]
    assert engine.held == [*TOKENIZER.ids("u hi a ok"), EOS, *TOKENIZER.ids("u yo a ok")]


def test_text_cut_at_a_stop_string_starts_anew():
    chat, engine = conversation("abcd")
    assert say(chat, "hi", stop=["cd"]) == "ab"
    assert engine.held == TOKENIZER.ids("u hi a abc")  # more than the conversation says
    say(chat, "yo")
    assert chat.was_reset
    assert prefills(engine)[-1] == [*TOKENIZER.ids("u hi a ab"), EOS, *TOKENIZER.ids("u yo a ")]


def test_reset_forgets_the_conversation_but_not_the_system_message():
    chat, engine = conversation("ok", system="be")
    say(chat, "hi")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be"}]
    assert engine.n_past == 0
    assert "reset_cache" not in engine.calls


def test_a_full_context_leaves_the_conversation_as_it_was():
    chat, _ = conversation("ok", context=16)
    say(chat, "hi")
    before = list(chat.messages)
    with pytest.raises(ConfigError, match=r"The conversation has \d+ tokens and the context is 16: .* --ctx \d+"):
        chat.send("a question that is too long", max_new_tokens=4)
    assert chat.messages == before
    chat.reset()
    assert say(chat, "hi") == "ok"


def test_a_stopped_answer_stays_in_the_conversation():
    chat, engine = conversation("abcdef")
    steps = chat.send("hi", max_new_tokens=20)
    assert next(steps).text + next(steps).text == "ab"
    steps.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    assert chat._held == engine.held == TOKENIZER.ids("u hi a a")  # "b" was said, not fed back
    say(chat, "yo")
    assert not chat.was_reset


def test_a_turn_given_up_before_its_first_token_did_not_happen():
    chat, _ = conversation("abc")
    chat.send("hi", max_new_tokens=4).close()
    assert chat.messages == []


def test_turns_draw_different_numbers():
    chat, _ = conversation("abc")
    hot = Sampling(temperature=9.0, seed=1)
    answers = [say(chat, "hi", n=8, sampling=hot) for _ in range(2)]
    again, _ = conversation("abc")
    assert answers == [say(again, "hi", n=8, sampling=hot) for _ in range(2)]
    assert answers[0] != answers[1]


def test_a_bundle_without_template_cannot_chat():
    with pytest.raises(ConfigError, match=r"no chat template; use `dipper run --raw`"):
        Conversation(FakeEngine([3]), FakeTokenizer(has_chat_template=False))
