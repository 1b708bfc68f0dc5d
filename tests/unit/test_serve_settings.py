"""What a service may be told, who may ask it, and which messages it understands."""

import asyncio
import importlib
import inspect
import json
import re
import socket
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from erniem_batch.cli import main
from erniem_batch.config import DTYPES, PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.options import OPTIONS, TASKS, options_of
from erniem_batch.serve import deployments
from erniem_batch.serve.addresses import DIRECT_PORT
from erniem_batch.serve.api import make_api
from erniem_batch.serve.body_limits import BodyLimits
from erniem_batch.serve.config import AppConfig, Autoscaling, ModelConfig, app_config
from erniem_batch.serve.flags import ServeFlags
from erniem_batch.serve.hosts import is_known_host
from erniem_batch.serve.messages import (
    EXAMPLES,
    NOT_ONLINE,
    OPTION_MODELS,
    REQUESTS,
    RESULTS,
    Done,
    Failed,
    given_options,
    items_of,
)
from erniem_batch.serve.models import model_folders
from erniem_batch.serve.run import (
    ACCESS_LOG,
    _settings_of_ray,
    _with_what_is_known_here,
    require_free,
)
from erniem_batch.serve.tokens import VARIABLE, allowed_hashes, hash_of, is_allowed, new_token
from erniem_batch.tasks.make import make_task

# ---- settings -----------------------------------------------------------------------------------


def test_the_shorthand_is_one_model():
    config = app_config({"model": "some/folder", "tasks": "ner, classify", "num_cpus": "2"})
    (only,) = config.all_models
    assert (only.name, only.model, only.tasks) == ("default", "some/folder", ("ner", "classify"))
    assert only.predictor("ner").n_threads == 2
    assert only.predictor("ner").device == "cpu"
    assert AppConfig().all_models[0].name == "demo"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modell": "demo"}, ["modell", "not permitted"]),
        ({"models": [{"name": "a", "tasks": ["nerd"]}]}, ["models.0.tasks.0", "'ner'"]),
        ({"models": [{"name": "a"}, {"name": "a"}]}, ["a name of its own"]),
        ({"models": [{"name": "a/b"}]}, ["models.0.name"]),
        ({"models": [{"name": "a"}], "model": "b"}, ["model: say it in models"]),
        ({"models": [{"options": {"ner": {"top_k": 1}}}]}, ["ner has no option 'top_k'"]),
        ({"models": [{"options": {"ner": {"min_score": 7}}}]}, ["min_score must be from 0 to 1"]),
        ({"models": [{"overlap_tokens": 0, "max_batch_tokens": 8}]}, ["raise max_batch_tokens"]),
        ({"models": [{"replicas": {"min_replicas": 3, "max_replicas": 2}}]}, ["min_replicas=3"]),
        ({"request_timeout_s": 0}, ["request_timeout_s", "greater than 0"]),
        ({"tokens": ["secret"]}, ["tokens.0"]),
    ],
)
def test_mistakes_are_named(values, words):
    with pytest.raises(ConfigError) as error:
        app_config(values)
    for word in words:
        assert word in str(error.value)


def test_types_of_numbers_are_those_of_a_predictor():
    assert set(get_args(ModelConfig.model_fields["dtype"].annotation)) == set(DTYPES)


def test_settings_of_a_file_and_of_flags(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("models:\n- {name: a, model: demo, tasks: [ner]}\nrequest_timeout_s: 5\n")
    config = ServeFlags(config=str(path)).app_config(2)
    assert config.all_models[0] == ModelConfig(name="a", tasks=("ner",))
    assert config.request_timeout_s == 5
    assert ServeFlags().app_config(cores=2).num_cpus == 2
    assert ServeFlags().app_config(cores=64).num_cpus == 4
    assert ServeFlags(num_gpus=1).app_config(64).all_models[0].predictor("qa").device == "cuda"
    assert ServeFlags(tasks="qa").app_config(2).tasks == ("qa",)
    for flags, words in (
        (ServeFlags(config=str(path), model="x"), "--config says all"),
        (ServeFlags(config=str(tmp_path / "none.yaml")), "there is no file"),
        (ServeFlags(tls_cert="a"), "go together"),
    ):
        with pytest.raises(ConfigError, match=words):
            flags.app_config(2)
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        ServeFlags(config=str(path)).app_config(2)


def test_what_a_model_can_do(service_dir, ner_model_dir):
    folders = model_folders(ModelConfig(name="m", model=str(service_dir)))
    assert set(folders) == set(TASKS)
    assert folders["embed"].name == "encoder"
    assert set(model_folders(ModelConfig(name="m", model=str(ner_model_dir)))) == {"ner"}
    two = ModelConfig(name="m", model=str(service_dir), tasks=("qa", "ner"))
    assert list(model_folders(two)) == ["qa", "ner"]
    with pytest.raises(ConfigError, match="is not a folder"):
        model_folders(ModelConfig(name="m", model=str(service_dir / "none")))


def test_a_training_lacks_a_head(service_dir, tmp_path):
    (tmp_path / "encoder").symlink_to(service_dir / "encoder")
    (tmp_path / "ner").symlink_to(service_dir / "ner")
    assert set(model_folders(ModelConfig(name="m", model=str(tmp_path)))) == {"ner", "embed"}
    with pytest.raises(ConfigError, match="no head for qa; it has ner"):
        model_folders(ModelConfig(name="m", model=str(tmp_path), tasks=("ner", "qa")))


def test_the_builder_makes_a_deployment_of_each_model():
    serve_app = pytest.importorskip("erniem_batch.serve.deployments")
    one = serve_app.app(AppConfig(num_cpus=2))
    assert one._bound_deployment.name == "http"
    assert one._bound_deployment.ray_actor_options["num_cpus"] == 2
    scaling = Autoscaling(min_replicas=0, max_replicas=3)
    models = (ModelConfig(name="a", num_gpus=0.5, replicas=scaling), ModelConfig(name="b"))
    many = serve_app.app(AppConfig(models=models))._bound_deployment
    assert many.ray_actor_options["num_cpus"] == serve_app.HTTP_CPUS
    front, handles = many.init_args
    assert front.models == (), "a change of a model is none of the front"
    assert list(handles) == ["a", "b"]
    deployment = handles["a"]._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3


def test_the_file_for_clusters_is_right():
    """Serve itself takes misspelt keys in silence."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    path = Path(__file__).parents[2] / "deploy" / "serve.yaml"
    values = yaml.safe_load(path.read_text())
    assert set(values) <= set(ServeDeploySchema.model_fields)
    assert set(values["http_options"]) <= {*HTTPOptionsSchema.model_fields}
    (application,) = values["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    ServeDeploySchema(**values)
    config = app_config(application["args"])
    assert [model.name for model in config.all_models] == ["names", "rest"]
    assert config.request_timeout_s < values["http_options"]["request_timeout_s"]
    module, _, name = application["import_path"].partition(":")
    for _ in range(2):  # a module of the same name must not come in between
        assert callable(getattr(importlib.import_module(module), name))


# ---- tokens -------------------------------------------------------------------------------------


def test_tokens_come_from_settings_file_and_environment(tmp_path, monkeypatch):
    tokens = [new_token() for _ in range(3)]
    assert len({token for token, _ in tokens}) == 3
    hashes = [digest for _, digest in tokens]
    path = tmp_path / "tokens"
    path.write_text(f"# who may ask\n\n{hashes[1]}  the nightly job\n")
    monkeypatch.setenv(VARIABLE, hashes[2])
    config = AppConfig(tokens=(hashes[0],), tokens_file=str(path))
    assert sorted(allowed_hashes(config)) == sorted(hashes)
    for token, _ in tokens:
        assert is_allowed(f"Bearer {token}", hashes)
        assert is_allowed(f"bearer {token}", hashes)
        assert not is_allowed(f"Basic {token}", hashes)
        assert not is_allowed(token, hashes)
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Bearer {hashes[0]}",
        "Bearer \udcff",
    ):
        assert not is_allowed(wrong, hashes)


def test_without_tokens_everybody_may(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert allowed_hashes(AppConfig()) == ()
    assert is_allowed(None, ())


@pytest.mark.parametrize("value", ["", ",", " ,\t\n", "# nobody", "#a,#b", "\ufeff"])
def test_tokens_that_are_set_but_empty_open_no_door(tmp_path, monkeypatch, capsys, value):
    """In the environment, in a file, in settings and on the command line."""
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=r"variable ERNIEM_BATCH_TOKENS.*(no hash|no SHA)"):
        allowed_hashes(AppConfig())
    with pytest.raises(ConfigError):
        make_api(AppConfig(), {})
    assert main(["serve"]) == 2
    assert "ERNIEM_BATCH_TOKENS" in capsys.readouterr().err
    monkeypatch.delenv(VARIABLE)
    path = tmp_path / "tokens"
    path.write_text(value)
    assert main(["serve", "--tokens-file", str(path)]) == 2
    told = capsys.readouterr().err
    assert "tokens_file" in told
    assert "no hash" in told or "no SHA-256" in told
    with pytest.raises(ConfigError, match="tokens"):
        app_config({"tokens": value})


def test_empty_names_of_token_settings_open_no_door(capsys):
    with pytest.raises(ConfigError, match="tokens: is given but holds no hash; leave it out"):
        app_config({"tokens": []})
    with pytest.raises(ConfigError, match="tokens_file"):
        app_config({"tokens_file": ""})
    assert main(["serve", "--tokens-file", ""]) == 2
    assert "tokens_file" in capsys.readouterr().err


def test_tokens_of_the_environment_reach_replicas_elsewhere(monkeypatch):
    """With --address they have another environment."""
    (_, one), (_, two) = new_token(), new_token()
    monkeypatch.setenv(VARIABLE, f"{one},{two}")
    config = _with_what_is_known_here(AppConfig(tokens=(one,)), ServeFlags())
    assert config.tokens == (one, two)


@pytest.mark.parametrize("content", ["", "# nobody\n", "my-secret-token\n", "ABC\n"])
def test_a_file_of_tokens_that_is_none_opens_no_door(tmp_path, content):
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        allowed_hashes(AppConfig(tokens_file=str(path)))
    assert "my-secret" not in str(error.value)
    with pytest.raises(ConfigError, match="there is no file"):
        allowed_hashes(AppConfig(tokens_file=str(tmp_path / "none")))


def test_the_command_makes_a_token(capsys):
    assert main(["token"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert hash_of(made["token"]) == made["sha256"]


def test_limits_of_bodies_are_documented():
    """Name and default of each variable, as a proxy on a cluster reads them."""
    readme = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    for name, value in BodyLimits().as_environment().items():
        (row,) = re.findall(rf"^\| `{name}` \| `(\w+)` \| (\d+) \|", readme, flags=re.M)
        assert getattr(AppConfig(), row[0]) == float(row[1]) == float(value)
        assert BodyLimits.from_environment({name: "5"}) != BodyLimits()


# ---- hosts --------------------------------------------------------------------------------------


def scope_of(host, server="127.0.0.1"):
    return {"headers": [(b"host", host.encode("latin-1"))], "server": (server, 8000)}


@pytest.mark.parametrize(
    ("host", "server", "allowed", "known"),
    [
        ("localhost:8000", "127.0.0.1", (), True),
        ("LOCALHOST.", "127.0.0.1", (), True),
        ("app.localhost:8000", "127.0.0.1", (), True),
        ("127.0.0.1", "127.0.0.1", (), True),
        ("127.1.2.3:80", "127.0.0.1", (), True),
        ("[::1]:8000", "::1", (), True),
        ("[::ffff:127.0.0.1]", "127.0.0.1", (), True),
        # In a pod, where it listens on every address: that of the pod.
        ("198.51.100.7:8000", "198.51.100.7", (), True),
        ("198.51.100.7", "::ffff:198.51.100.7", (), True),
        ("198.51.100.8", "198.51.100.7", (), False),
        ("evil.example", "127.0.0.1", (), False),
        ("localhost.evil.example", "127.0.0.1", (), False),
        ("127.0.0.1.evil.example", "127.0.0.1", (), False),
        ("evil.example:127.0.0.1", "127.0.0.1", (), False),
        ("evillocalhost", "127.0.0.1", (), False),
        ("2130706433", "127.0.0.1", (), False),
        ("", "127.0.0.1", (), False),
        ("[::1", "127.0.0.1", (), True),
        ("\xe9vil.example", "127.0.0.1", (), False),
        ("serve-svc.default.svc:8000", "198.51.100.7", ("serve-svc.default.svc",), True),
        ("Serve-Svc", "198.51.100.7", ("serve-svc",), True),
        ("a.b.example.org", "127.0.0.1", ("*.example.org",), True),
        ("example.org", "127.0.0.1", ("*.example.org",), False),
        ("anexample.org", "127.0.0.1", ("*.example.org",), False),
        ("anything", "127.0.0.1", ("*",), True),
    ],
)
def test_hosts(host, server, allowed, known):
    assert is_known_host(scope_of(host, server), allowed) == known


def test_every_host_of_a_request_counts():
    scope = scope_of("localhost")
    scope["headers"].append((b"Host", b"evil.example"))
    assert not is_known_host(scope, ())
    assert is_known_host({"headers": [], "server": None}, ()), "no browser asks without one"


def test_hosts_of_settings_flags_and_address(tmp_path, monkeypatch, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text("allowed_hosts: [a.example]\n")
    flags = ServeFlags(config=str(path), allowed_host=("b.example",), host="c.example")
    config = _with_what_is_known_here(flags.app_config(1), flags)
    assert config.allowed_hosts == ("a.example", "b.example", "c.example")
    flags = ServeFlags(host="c.example")
    assert _with_what_is_known_here(flags.app_config(1), flags).allowed_hosts == ("c.example",)
    monkeypatch.setenv(VARIABLE, new_token()[1])
    assert _with_what_is_known_here(flags.app_config(1), flags).allowed_hosts == ()
    for wrong in ("http://a.example", "a.example:80", "", "a.*"):
        assert main(["serve", "--allowed-host", wrong]) == 2
        assert "allowed_hosts" in capsys.readouterr().err


# ---- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_options_are_those_of_the_command_line(task):
    """Under the same names, with the same defaults."""
    online = {f.alias: f for f in OPTION_MODELS[task].model_fields.values()}
    offline = {f.name: f for f in fields(OPTIONS[task]) if f.name not in NOT_ONLINE.get(task, ())}
    assert set(online) == set(offline)
    for name, field in offline.items():
        default = online[name].default
        assert (tuple(default) if isinstance(default, list) else default) == field.default, name
        assert online[name].description, name


@pytest.mark.parametrize("task", TASKS)
def test_results_are_the_columns_of_a_batch(task, tokenizer):
    values = {"schema": ["Person"], "output_json": True} if task == "extract" else {}
    config = PredictorConfig(options=options_of(task, values))
    model = ErnieMConfig(vocab_size=len(tokenizer)).with_labels(["O", "B-PER"])
    schema = make_task(config, tokenizer, model).schema
    own = set(RESULTS[task].model_fields) - set(Done.model_fields)
    assert own == set(schema.names)


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_valid(task):
    for value in EXAMPLES[task].values():
        request = REQUESTS[task].model_validate(value)
        options = given_options(request.options)
        assert set(options) == set(value.get("options", {}))
        options_of(task, options)
        items = items_of(task, request.inputs)
        assert all(isinstance(item["text"], str) for item in items)
    assert Failed.model_fields.keys() == {"id", "error"}


@pytest.mark.parametrize(
    ("task", "body", "place"),
    [
        ("ner", {}, "inputs"),
        ("ner", {"inputs": 3}, "inputs.0"),
        ("ner", {"inputs": [None]}, "inputs.0"),
        ("ner", {"inputs": {"text": 3}}, "inputs.0.text"),
        ("ner", {"inputs": "a", "extra": 1}, "extra"),
        ("ner", {"inputs": "a", "options": {"min_score": "thresholds.json"}}, "options.min_score"),
        ("ner", {"inputs": "a", "options": {"offset_unit": "utf8"}}, "options.offset_unit"),
        ("qa", {"inputs": "a"}, "inputs.0"),
        ("qa", {"inputs": {"question": "a"}}, "inputs.0.context"),
        ("qa", {"inputs": [], "options": {"top_k": 0}}, "options.top_k"),
        ("choose", {"inputs": {"premise": "a", "choices": []}}, "inputs.0.choices"),
        ("embed", {"inputs": "a", "options": {"pooling": "none"}}, "options.pooling"),
        ("extract", {"inputs": "a", "options": {"taskflow_compat": True}}, "taskflow_compat"),
    ],
)
def test_what_is_no_request(task, body, place):
    with pytest.raises(ValidationError) as error:
        REQUESTS[task].model_validate(body)
    places = [".".join(map(str, item["loc"])) for item in error.value.errors()]
    assert any(place in found for found in places), places


@pytest.mark.parametrize("flag", ["port", "direct-port"])
def test_a_port_that_is_taken(capsys, flag):
    """Ray's proxies would share it with those of another Ray, and nobody would know."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        other = [] if flag == "port" else ["--port", "0"]
        assert main(["serve", f"--{flag}", str(port), *other]) == 2
    error = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 cannot be used" in error
    assert f"give another --{flag}" in error
    require_free(flag, "127.0.0.1", port)


def test_ports_of_replicas_are_opened_when_asked_for():
    plain, direct = _settings_of_ray(None, {}), _settings_of_ray(65000, {})
    assert plain["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    assert direct["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1"
    ports = [direct[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"] for end in ("MIN", "MAX")]
    assert ports == ["65000", "65535"]
    assert direct[DIRECT_PORT] == "65000"
    from ray._private import ray_constants
    from ray.serve._private import constants

    known = inspect.getsource(constants) + inspect.getsource(ray_constants)
    names = [name for name in [*direct, *ACCESS_LOG] if name.startswith("RAY_")]
    assert not [name for name in names if f'"{name}"' not in known], "as Ray calls them"


def test_the_environment_wins_over_defaults_and_a_flag_over_the_environment():
    min_port = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"
    drain = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
    enable = "RAY_SERVE_ENABLE_DIRECT_INGRESS"
    there = {enable: "0", min_port: "30000", drain: "5"}
    direct = _settings_of_ray(8001, there)
    assert (direct[enable], direct[min_port], direct[drain]) == ("1", "8001", "5")
    assert _settings_of_ray(None, {enable: "1"})[enable] == "1"


def test_a_direct_port_of_another_ray(capsys):
    assert main(["serve", "--direct-port", "8001", "--address", "127.0.0.1:1"]) == 2
    assert "--direct-port is for a Ray of its own" in capsys.readouterr().err


def test_a_question_that_got_lost_is_asked_again(monkeypatch):
    """Of the deployment that speaks HTTP, to the replicas of a model, when both start."""
    monkeypatch.setattr(deployments, "ASK_AGAIN_S", 0.05)

    class Handle:
        deployment_name = "tiny"

        def __init__(self) -> None:
            self.card = self
            self.asked = 0

        async def remote(self) -> dict[str, str]:
            self.asked += 1
            if self.asked < 3:
                await asyncio.Event().wait()
            return {}

    handle = Handle()
    asyncio.run(deployments.RemoteEngine(handle).start())
    assert handle.asked == 3
