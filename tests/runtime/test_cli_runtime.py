"""The commands as people type them: every mistake is one line and status 2, and bad requests hurt nobody else."""

import json
import shutil
import socket
import subprocess
import sys

import httpx
import openai
import pytest
from runtime.servers import Command, InFlight, Serving, free_port, until
from safetensors.torch import load_file, save_file

from gllm.runtime.default_model import PATH

HUGE = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 120, "vocab_size": 150000}
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def folder(tmp_path):
    """A copy of the default model, to be spoiled."""
    for name in MODEL_FILES:
        shutil.copy(PATH / name, tmp_path / name)
    return tmp_path


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def assert_refused(*args, said, command="serve"):
    """One line that holds `said`, status 2, nothing on standard output, nothing left."""
    port = ("--port", 0) if command == "serve" and "--port" not in args else ()
    with Command(command, *args, *port) as done:
        status, lines = done.ended()
        assert (status, len(lines), done.out) == (2, 1, ""), (status, lines, done.out)
        assert lines[0].startswith("gllm: error: ")
        assert said in lines[0], lines[0]
        assert done.left() == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("/no/such/model",), "'/no/such/model': no such folder"),
        (("",), "no such folder"),
        (("--tp", 3), "--tp 3 does not divide the 4 attention heads"),
        (("--pp", 5), "--pp 5 is more than the 4 layers"),
        (("--pp", 2, "--pp-layers", "1,2"), "--pp-layers add up to 3"),
        (("--pp", 2, "--pp-layers", "1,2,1"), "must be 2 positive numbers"),
        (("--ep", 2, "--tp", 2), "--ep 2: default_model has no experts"),
        (("--policy", "fifo"), "unknown policy 'fifo'"),
        (("--policy", "throttle:haste=1"), "unknown option 'haste=1'"),
        (("--max-model-len", 999999), "--max-model-len 999999 is more than the 2048 positions"),
        (("--num-blocks", 0), "--num-blocks"),
        (("--chat-template", "/no/such/file"), "--chat-template /no/such/file: no such file"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 is no address of this machine"),
        (("--port", 99999), "--port is 99999"),
        (("--nnodes", 2, "--pp", 2), "--rdzv-endpoint is ''"),
        (("--nnodes", 2, "--pp", 2, "--rdzv-endpoint", "127.0.0.1:99999"), "HOST:PORT"),
        (("--nnodes", 2, "--pp", 2, "--rdzv-endpoint", "192.0.2.1:29500"), "cannot be had on this machine"),
        (("--nnodes", 2, "--rdzv-endpoint", "127.0.0.1:1"), "--nnodes 2 does not divide the 1 workers"),
        (("--nnodes", 2, "--node-rank", 2, "--pp", 2), "--node-rank is 2"),
        (("--rdzv-endpoint", "127.0.0.1:29500"), "say with --nnodes"),
        (("--hast",), "unrecognized arguments: --hast"),
    ],
)
def test_options_that_do_not_fit(args, said):
    assert_refused(*args, said=said)


def test_ports_that_are_taken():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert_refused("--port", port, said=f"port {port} on 127.0.0.1 is taken")
        nodes = ("--nnodes", 2, "--pp", 2, "--rdzv-endpoint", f"127.0.0.1:{port}")
        assert_refused(*nodes, said=f"--rdzv-endpoint 127.0.0.1:{port} cannot be had")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{oops", "config.json: not valid JSON"),
        ("config.json", '{"architectures": ["Mamba"]}', "architecture 'Mamba'"),
        ("generation_config.json", '{"temperature": "hot"}', "generation_config.json: temperature"),
        ("tokenizer.json", "{oops", "its tokenizer cannot be read"),
        ("model.safetensors", "garbage", "cannot be read as safetensors"),
        ("model.safetensors", None, "neither model.safetensors nor"),
    ],
)
def test_a_folder_with_a_spoiled_file(folder, name, content, said):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert_refused(folder, said=said)


def test_a_missing_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    assert_refused(folder, "--pp", 2, said="no tensor 'model.layers.3.mlp.up_proj.weight'")


@pytest.mark.parametrize(
    ("keys", "args", "said"),
    [
        (HUGE, ("--load-format", "dummy"), "GiB are free on its cpu"),
        ({}, ("--max-num-seqs", 100_000_000), "ran out of memory"),
        ({}, ("--kv-cache-memory-bytes", 10), "--kv-cache-memory-bytes 10 is less than one block"),
    ],
)
def test_not_enough_memory(folder, keys, args, said):
    change(folder, **keys)
    assert_refused(folder, *args, said=said)


@pytest.mark.parametrize(("content", "said"), [(b"{% for %}", "no Jinja template (line 1"), (b"\xff", "'utf-8' codec")])
def test_a_chat_template_that_is_none(tmp_path, content, said):
    (tmp_path / "chat.jinja").write_bytes(content)
    assert_refused("--chat-template", tmp_path / "chat.jinja", said=f"{tmp_path / 'chat.jinja'}: {said}")


def test_help_imports_nothing_heavy():
    program = (
        "import sys, gllm.runtime.cli as cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'zmq', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    assert "--rdzv-endpoint" in done.stdout
    assert done.stderr == "[]\n"


# Requests to a server that lives on


@pytest.fixture(scope="module")
def server():
    """Shared: nothing below harms it. Its cache holds 512 tokens, its model 2,048."""
    with Serving("--num-blocks", 32) as serving:
        yield serving.ready()
        serving.process.terminate()
        assert serving.ended() == (0, [])
        assert serving.left() == []


CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "a" * 3000}, "512"),
        ("/v1/completions", {"prompt": "a" * 1000}, "512"),
        ("/v1/completions", {"prompt": [1] * 512}, "512"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 3000}]}, "512"),
        ("/v1/completions", {"prompt": "abc", "max_tokens": 100_000}, "max_tokens"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [264]}, "vocabulary"),
        ("/v1/completions", {"prompt": 7}, "prompt"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": "abc", "temperature": "hot"}, "temperature"),
        ("/v1/completions", {"prompt": "abc", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "abc", "logit_bias": {"9999": 1}}, "9999"),
        ("/v1/completions", {"prompt": "abc", "wings": 2}, "unknown field 'wings'"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_get_400_and_the_server_lives_on(server, path, body, said, stream):
    response = server.post(path, **body, stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert said in error["message"] or said == error["param"], error
    assert server.complete().status_code == 200


def test_a_body_that_is_no_json(server):
    response = httpx.post(f"{server.url}/v1/completions", content=b"{oops", trust_env=False)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "BadRequestError")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_forgotten(server, stream):
    body = {"prompt": ["abc"] * 64, "max_tokens": 500, "min_tokens": 500, "ignore_eos": True, "stream": stream}
    for _ in range(3):  # the cache holds one of the 64: they take minutes, however long a busy machine looks away
        request = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as sock:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(request) + request)
            until(lambda: server.running() >= 1 and server.waiting() >= 1, what="a running and a waiting request")
        until(lambda: server.running() == server.waiting() == 0, timeout_s=10, what="their end")


def test_more_requests_than_the_cache_holds(server):
    flying = [InFlight(server, stream=False, max_tokens=200, min_tokens=200) for _ in range(8)]
    assert [each.result()[0] for each in flying] == [200] * 8
    assert server.running() == 0


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))


def test_the_openai_client_lists_models(client):
    assert [card.id for card in client.models.list()] == ["gllm-demo"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_the_openai_client_chats(client):
    asked = {"model": "gllm-demo", "messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert whole.message.content
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason == "stop"


def test_the_openai_client_completes(client):
    asked = {"model": "gllm-demo", "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens) == 8
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == whole.choices[0].text


def test_the_openai_client_is_told_of_errors(client):
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model="gllm-demo", prompt="a" * 1000)
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="unknown field 'wings'"):
        client.completions.create(model="gllm-demo", prompt="abc", extra_body={"wings": 2})


# The other commands


def finished(*args, text=None):
    """Status, standard output and the lines on standard error of a command with this standard input."""
    with Command(*args, stdin=subprocess.PIPE) as done:
        done.process.stdin.write(text or "")
        done.process.stdin.close()
        status, lines = done.ended()
        assert done.left() == []
        return status, done.out, lines


def test_generate():
    greedy = ("--temperature", 0, "--max-tokens", 8, "--quiet")
    status, typed, lines = finished("generate", "abc", "Sort: 3 1 2", *greedy)
    assert (status, lines) == (0, [])
    assert typed.startswith("abc")
    assert "\nSort: 3 1 2" in typed
    status, piped, lines = finished("generate", "--json", *greedy, text="abc\n\nSort: 3 1 2\n")
    assert (status, lines) == (0, [])
    outputs = [json.loads(line) for line in piped.splitlines()]
    assert "".join(f"{output['prompt']}{output['outputs'][0]['text']}\n" for output in outputs) == typed
    assert finished("generate", text="\n")[::2] == (
        2,
        ["gllm: error: no prompt; give some on the command line, or one a line on standard input"],
    )


def test_generate_refuses_a_prompt_that_is_too_long():
    status, out, lines = finished("generate", "a" * 3000, "--quiet")
    assert (status, out, len(lines)) == (2, "", 1)
    assert "the prompt has 3000 tokens" in lines[0] or "2048" in lines[0]


def test_chat():
    talk = ["What is 2 + 3?", "", "/clear", "What is 2 + 3?", "a" * 3000, "What is 2 + 3?", "/exit", "not asked"]
    status, out, lines = finished("chat", "--temperature", 0, text="\n".join(talk))
    answers = out.splitlines()
    assert status == 0
    assert answers[0] == answers[1] != ""
    assert len(answers) >= 3
    assert len(lines) == 1, lines
    assert lines[0].endswith("/clear begins anew")
    assert "not asked" not in out


def test_evaluate_starts_a_server_of_its_own():
    status, out, lines = finished("evaluate", "--num-cases", 12, "--json", "--quiet")
    result = json.loads(out)
    assert (status, result["num_cases"], result["num_errors"], lines) == (0, 12, 0, [])
    assert result["accuracy"] >= 0.95
    status, _, lines = finished("evaluate", "--base-url", f"http://127.0.0.1:{free_port()}", "--quiet")
    assert (status, len(lines)) == (2, 1)
    assert "no server answers there" in lines[0]


TRACE = "".join(
    json.dumps({"timestamp": 10 * number, "input_length": 20, "output_length": 8, "hash_ids": [0]}) + "\n"
    for number in range(6)
)
LATE = TRACE.splitlines()[-1].replace('"timestamp": 50', '"timestamp": 600000') + "\n"
RUN = {
    *("report.html", "report.json", "record.npz", "requests.csv", "timeline.json"),
    *("iterations.jsonl.gz", "trace.jsonl.gz"),
}


def test_replay_writes_the_simulators_folder(tmp_path):
    (tmp_path / "trace.jsonl").write_text(TRACE)
    out = tmp_path / "runs" / "first"
    status, table, lines = finished("replay", tmp_path / "trace.jsonl", "--out", out, "--quiet", "--json")
    assert (status, lines) == (0, [])
    assert {path.name for path in out.iterdir()} == RUN
    assert json.loads(table)["num_requests"] == 6
    (out / "notes.txt").write_text("mine")
    assert_refused(tmp_path / "trace.jsonl", "--out", out, said="holds notes.txt", command="replay")


def test_replay_interrupted_leaves_nothing(tmp_path):
    (tmp_path / "trace.jsonl").write_text(TRACE + LATE)
    with Command("replay", tmp_path / "trace.jsonl", "--out", tmp_path / "out") as command:
        until(lambda: list(tmp_path.glob("out/.gllm.*/*")), what="the log")
        command.interrupt()
        assert command.ended() == (130, ["gllm: interrupted"])
        assert command.left() == []
    assert not (tmp_path / "out").exists()


def test_replay_refuses_a_bad_trace(tmp_path):
    (tmp_path / "trace.jsonl").write_text("{oops\n")
    assert_refused(tmp_path / "trace.jsonl", said="trace.jsonl", command="replay")
    assert_refused(tmp_path / "none.jsonl", said="none.jsonl", command="replay")
