"""The default model: its tasks, its tokenizer, and that it answers what it never saw."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm.runtime.default_model import PATH
from gllm.runtime.default_model.corpus import IGNORED, packed_rows
from gllm.runtime.default_model.model_folder import MODEL
from gllm.runtime.default_model.tasks import SCORED, TASKS, draw_case, draw_problem, held_out_cases, is_held_out
from gllm.runtime.default_model.tokenizer import IM_END, PAD, SPECIAL, VOCAB_SIZE, chat_pieces, prompt_ids
from gllm.runtime.default_model.words import COPY, SHARED_PREFIX

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)


def problems(task, *, held_out, seed=0, count=300):
    rng = Random(seed)
    return [draw_problem(rng, task, held_out=held_out) for _ in range(count)]


def answered(model, tokenizer, prompts, max_new_tokens):
    """What the model says after each prompt of token ids, greedily, all at once."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    said = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(said[:, width:], skip_special_tokens=True)


def test_a_seed_decides_the_cases():
    assert held_out_cases(40, 7) == held_out_cases(40, 7)
    assert held_out_cases(40, 7) != held_out_cases(40, 8)
    assert [case.task for case in held_out_cases(8, 0)] == [*SCORED, *SCORED]


@pytest.mark.parametrize("task", SCORED)
def test_training_never_draws_a_held_out_problem(task):
    trained = {problem.key for problem in problems(task, held_out=False, count=2000)}
    held_out = {problem.key for problem in problems(task, held_out=True, count=200)}
    assert held_out
    assert trained.isdisjoint(held_out)
    assert all(is_held_out(task, key) for key in held_out)


def test_the_split_looks_at_what_is_asked_and_not_at_how():
    by_key = {}
    for problem in problems("sort", held_out=True, count=200):
        items = re.findall(r"\w+", problem.line.partition(":")[2])
        assert problem.key == " ".join(sorted(items))
        by_key.setdefault(problem.key, set()).add(problem.question)
    sums = [problem for problem in problems("arithmetic", held_out=True) if "+" in problem.key]
    assert sums
    for problem in sums:
        a, b = map(int, problem.key.split("+"))
        assert a <= b  # 3 + 40 and 40 + 3 are one problem


def test_earlier_questions_of_a_training_chat_are_of_the_training_side():
    rng = Random(3)
    held_out = {problem.question for task in SCORED for problem in problems(task, held_out=True)}
    chats = [draw_case(rng, "copy", held_out=False) for _ in range(500)]
    asked = [message["content"] for chat in chats for message in chat.messages if message["role"] == "user"]
    assert len(asked) > len(chats)
    assert held_out.isdisjoint(asked)


@pytest.mark.parametrize("held_out", [True, False])
def test_arithmetic_is_right(held_out):
    for problem in problems("arithmetic", held_out=held_out):
        a, b = map(int, re.findall(r"\d+", problem.question))
        if re.search(r"[Ss]ubtract|[Tt]ake", problem.question):
            a, b = b, a
        minus = re.search(r"-|minus|[Ss]ubtract|away", problem.question)
        assert int(problem.answer) == (a - b if minus else a + b)


@pytest.mark.parametrize("held_out", [True, False])
def test_sorting_is_right(held_out):
    for problem in problems("sort", held_out=held_out):
        items = re.findall(r"[0-9a-z]+", problem.line.partition(":")[2])
        answer = re.findall(r"[0-9a-z]+", problem.answer)
        numeric = items[0].isdigit()
        values = [int(item) if numeric else item for item in answer]
        backwards = problem.line.startswith("reverse")
        assert backwards == bool(re.search("descending|reverse|last", problem.question))
        assert sorted(items) == sorted(answer)
        assert all(a >= b if backwards else a <= b for a, b in pairwise(values))


def test_copies_are_exact():
    rests = [phrase.partition("{text}")[0].lower() for phrase in COPY]
    for problem in problems("copy", held_out=False):
        assert problem.answer
        assert problem.question.endswith(problem.answer)
        assert problem.question.removesuffix(problem.answer).lower() in rests


def test_templates_are_filled_from_the_sentence():
    for problem in problems("json", held_out=True):
        template = json.loads(re.search(r"\{.*?\}", problem.question)[0])
        filled = json.loads(problem.answer)
        sentence = problem.question.replace(re.search(r"\{.*?\}", problem.question)[0], "")
        assert list(filled) == list(template)
        for name, value in filled.items():
            assert type(value) is type(template[name])
            assert str(value) in sentence


def test_cases_come_alone_after_a_shared_prefix_and_after_other_questions():
    cases = held_out_cases(200, 0)
    shared = [case for case in cases if case.messages[0]["content"] == SHARED_PREFIX]
    later = [case for case in cases if len(case.messages) > 3]
    assert len(shared) > 10
    assert len(later) > 20
    assert all(case.messages[-1]["role"] == "user" for case in cases)
    assert max(len(prompt_ids(case.messages)) + len(case.answer.encode()) for case in cases) < 1024


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if not any(special in text for special in SPECIAL):
        assert ids == list(text.encode())


def test_the_vocabulary(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE == MODEL["vocab_size"]
    assert VOCAB_SIZE % 8 == 0
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(256, VOCAB_SIZE))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (IM_END, PAD)


def test_chats_are_trained_as_the_template_writes_them(tokenizer):
    for case in held_out_cases(50, 1):
        messages = list(case.messages)
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.encode(text) == prompt_ids(messages)
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": case.answer}], tokenize=False
        )
        assert tokenizer.encode(whole) == [token for ids, _ in chat_pieces(messages, case.answer) for token in ids]


def test_rows_hold_whole_documents_and_answers_are_what_follows():
    tokens, documents, targets = next(packed_rows(8, 512, "test"))
    assert tokens.shape == documents.shape == targets.shape == (8, 512)
    for row in range(8):
        (learned,) = (targets[row] != IGNORED).nonzero()
        assert len(learned)
        assert (targets[row][learned] == tokens[row][learned + 1]).all()
        assert (documents[row][learned] == documents[row][learned + 1]).all()
        assert ((tokens[row] == PAD) == (documents[row] == -1)).all()


def test_packing_documents_into_a_row_changes_nothing(model):
    from gllm.runtime.default_model.train import document_mask

    tokens, documents, _ = (torch.from_numpy(array).long() for array in next(packed_rows(1, 512, "packed")))
    with torch.inference_mode():
        packed = model(tokens, attention_mask=document_mask(documents), use_cache=False).logits[0]
        for number in range(int(documents.max()) + 1):
            (places,) = (documents[0] == number).nonzero(as_tuple=True)
            alone = model(tokens[:, places], use_cache=False).logits[0]
            assert torch.allclose(packed[places], alone, atol=1e-3)
    assert documents.max() > 0


def test_the_folder_says_what_was_trained(model):
    assert json.loads((PATH / "config.json").read_text()) == MODEL
    assert (PATH / "model.safetensors").stat().st_size < 6_000_000
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(weight.numel() for weight in model.parameters()) < 3_000_000
    assert set(model.generation_config.eos_token_id) == {256, IM_END}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_answers_what_it_never_saw(model, tokenizer, dtype):
    cases = [case for case in held_out_cases(200, 0) if len(prompt_ids(case.messages)) < 200][:60]
    prompts = [prompt_ids(case.messages) for case in cases]
    try:
        texts = answered(model.to(getattr(torch, dtype)), tokenizer, prompts, max_new_tokens=110)
    finally:
        model.float()
    right = [text == case.answer for text, case in zip(texts, cases, strict=True)]
    assert len(cases) == 60
    assert sum(right) >= 57


def test_it_answers_long_chats(model):
    from gllm.runtime.default_model.corpus import document_arrays
    from gllm.runtime.default_model.score import answer_margins

    cases = [case for case in held_out_cases(150, 2) if len(prompt_ids(case.messages)) > 500][:24]
    documents = [document_arrays(iter([(prompt_ids(case.messages), False), spoken(case.answer)])) for case in cases]
    margins = answer_margins(model, documents, "cpu")
    assert len(cases) == 24
    assert sum(margin > 0 for margin in margins) >= 23


def spoken(answer):
    return [*answer.encode(), IM_END], True


def test_the_margin_is_below_zero_for_a_wrong_answer(model):
    from gllm.runtime.default_model.corpus import document_arrays
    from gllm.runtime.default_model.score import answer_margins

    question = prompt_ids([{"role": "user", "content": "What is 20 + 22?"}])
    documents = [document_arrays(iter([(question, False), spoken(answer)])) for answer in ("42", "43", "421")]
    right, wrong, too_long = answer_margins(model, documents, "cpu")
    assert right > 0
    assert wrong < 0
    assert too_long < 0


def test_first_contact(model, tokenizer):
    chats = ["Hello", "What can you do?", "Thanks!", "What is the capital of France?"]
    prompts = [prompt_ids([{"role": "user", "content": text}]) for text in chats]
    prompts += [list(text.encode()) for text in ("copy: abc =>", "12 + 30 =", "Sort these numbers: 5, 3")]
    *chatted, copied, added, in_order = answered(model, tokenizer, prompts, max_new_tokens=60)
    hello, skills, thanks, beyond = chatted
    assert hello.startswith("Hello! I am gLLM's built-in demo model.")
    assert skills.startswith("I am gLLM's built-in demo model")
    assert thanks == "You are welcome!"
    assert "do not know that" in beyond
    assert (copied, added, in_order) == (" abc", " 42", "\n3, 5")


def test_training_writes_a_model_folder(tmp_path, capsys):
    from gllm.runtime.default_model.train import main

    options = ["--steps", "2", "--rows", "1", "--width", "512", "--num-workers", "0", "--num-cases", "4"]
    assert main(["--out", str(tmp_path), "--device", "cpu", *options]) == 0
    assert "step 2 (100%): loss" in capsys.readouterr().out
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_text() == (PATH / file).read_text()
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(weight.numel() for weight in trained.parameters()) < 3_000_000


def test_every_task_is_drawn():
    assert set(TASKS) == {*SCORED, "talk"}
    assert {problem.answer for problem in problems("talk", held_out=False)} >= {"Goodbye!", "You are welcome!"}
