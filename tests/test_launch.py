"""The scripts and manifests of launch/: files and keys that they name exist, and scripts that can run here work."""

import contextlib
import os
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from geotoken_jax import cli, processes
from tests import pod

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
#: The manifests of jobs; the other is a service.
JOBS = [path for path in MANIFESTS if path.name != "serve.yaml"]
#: Steps of the training that scripts run here, and steps after which it is interrupted.
STEPS, BROKEN = 40, 3


def train(folder: str, pause: str) -> None:
    """Trains a linear model in as many processes as there are, and exits as `geotoken` does.

    pause: seconds a step takes longer until it is broken off, so that what breaks it comes before the end.
    """
    from geotoken_jax import sharding
    from geotoken_jax.data import pipeline
    from geotoken_jax.train import loop
    from tests.test_train import OPTIMIZER, LineTask, read

    wait = 0.0 if (Path(folder) / "checkpoints").exists() else float(pause)

    def slowly(rows: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(wait)
        return read(rows)

    processes.start()
    options = loop.TrainSettings(
        batch_size=8, accumulate=1, examples=8 * STEPS, evaluate_every=STEPS, log_every=1, seed=0, ema=0.0,
        max_skipped=0, profile=(0, 0), profiler_port=0, save_every_s=0.0, keep=2, wandb="", optimizer=OPTIMIZER,
        gradient_dtype="float32", epochs=0, max_damaged=0.0,
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshSettings(-1, 1, 1))
    local = sharding.local_rows(mesh, 8)
    batches = pipeline.training(20, slowly, 8, 0, local)
    try:
        data = loop.Data(batches, lambda: pipeline.evaluation(12, read, 8, local), 20)
        loop.run(LineTask(), options, mesh, folder, data, "train")
    except loop.Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(cli.PREEMPTED)


def start(*command: str | Path, **environment: str) -> subprocess.Popen:
    """Starts a command in the repository, with one CPU device per process and no cache of compiled programs."""
    prefixes = ("JAX_", "MEGASCALE_", "SLURM_", "TPU_", "XLA_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def training(folder: Path, pause: float = 0.0) -> list[str]:
    return [sys.executable, "-m", "tests.test_launch", str(folder), str(pause)]


def wait_for_steps(folder: Path, steps: int) -> None:
    """Waits until a number of steps has been logged in total, over all restarts."""
    file, began = folder / "metrics.jsonl", time.monotonic()
    while not file.exists() or len(pod.lines(folder)) < steps:
        assert time.monotonic() - began < 240
        time.sleep(0.05)


def losses(folder: Path) -> np.ndarray:
    found = pod.sequence(folder, "train/loss", "train/gradient_norm")
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The losses of two processes without an interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = finish(start(LAUNCH / "processes.sh", "2", *training(folder)))
    assert code == 0, output
    return losses(folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_that_shellcheck_has_nothing_against(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    if not (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not found.stdout


def commands(text: str) -> Iterator[list[str]]:
    """Yields the arguments of every `geotoken VERB ...` in a text."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for command in re.findall(r"\bgeotoken (?=[a-z]+ [^`]*--config)([^`|;&#\n]*)", line):
            yield command.replace("'", "").replace('"', "").split()


def test_every_command_has_its_verb_its_configuration_and_its_keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found = [command for file in (*LAUNCH.iterdir(), ROOT / "docs/launch.md") for command in commands(file.read_text())]
    found += [args[args.index("geotoken") + 1 :] for manifest in JOBS for args in arguments(manifest)]
    assert len(found) > 10
    for command in found:
        options, rest = cli._parser().parse_known_args(command)
        assert cli._config(options, rest), command


def test_every_file_that_the_page_names_is_there():
    text = "".join(file.read_text() for file in (*LAUNCH.iterdir(), ROOT / "docs/launch.md"))
    named = set(re.findall(r"\b(?:launch|configs|docs|tests)/[\w.-]+\.\w+", text)) | {"launch/Containerfile"}
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def rendered(manifest: Path) -> list[dict]:
    """Returns the documents of a manifest, as `envsubst` hands them to kubectl."""
    text = string.Template(manifest.read_text()).safe_substitute(IMAGE="registry.example/geotoken:1")
    return list(yaml.safe_load_all(text))


def jobs(manifest: Path) -> list[dict]:
    """Returns the Jobs of a manifest, including the Jobs of a JobSet."""
    found = []
    for document in rendered(manifest):
        parts = document["spec"].get("replicatedJobs", [{"template": document}])
        found += [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}} | p["template"] for p in parts]
    return found


def arguments(manifest: Path) -> list[list[str]]:
    return [c["args"] for job in jobs(manifest) for c in job["spec"]["template"]["spec"]["containers"]]


#: Schema of the parts of a JobSet around its Jobs that are used here, from v1alpha2 of config/components/crd/bases in
#: github.com/kubernetes-sigs/jobset (0.10 or later).
JOBSET = {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": {"name": {"type": "string", "pattern": "^[a-z0-9-]{1,40}$"}, "annotations": {"type": "object"}},
    "spec": {
        "failurePolicy": {
            "maxRestarts": {"type": "integer", "minimum": 0},
            "rules": [
                {
                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    "onJobFailureReasons": {"type": "array", "items": {"enum": ["PodFailurePolicy"]}},
                    "onJobFailureMessagePatterns": {"type": "array", "items": {"type": "string"}},
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": {"type": "string", "pattern": "^[a-z0-9-]+$"},
                "replicas": {"type": "integer", "minimum": 1},
                "template": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
            }
        ],
    },
}


def schema(short: dict | list) -> dict:
    """Returns the JSON schema for the short form in JOBSET, which allows no other keys."""
    if isinstance(short, list):
        return {"type": "array", "items": schema(short[0])}
    if short.keys() & {"const", "enum", "type"}:
        return short
    return {"type": "object", "additionalProperties": False, "properties": {k: schema(v) for k, v in short.items()}}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_what_kubernetes_takes(manifest: Path):
    validate = pytest.importorskip("kubernetes_validate").validate
    jsonschema = pytest.importorskip("jsonschema")
    for document in jobs(manifest) if manifest in JOBS else rendered(manifest):
        validate(document, "1.33", strict=True)
    for document in rendered(manifest):
        if document["kind"] == "JobSet":
            jsonschema.validate(document, schema(JOBSET))


def test_the_manifest_of_the_service_fits_the_service():
    """Its flags, paths, metric, names and times."""
    app = pytest.importorskip("geotoken_jax.serve.app", reason="the extra `serve` is not installed")
    limits = pytest.importorskip("geotoken_jax.serve.limits")
    prometheus = pytest.importorskip("prometheus_client")
    from tests.test_serve import Shade

    documents = {document["kind"]: document for document in rendered(LAUNCH / "serve.yaml")}
    pod, scaler = documents["Deployment"]["spec"]["template"], documents["HorizontalPodAutoscaler"]["spec"]
    (container,) = pod["spec"]["containers"]
    options, rest = cli._parser().parse_known_args(container["args"][1:])
    assert not rest and options.verb == "serve" and options.host == "0.0.0.0"
    mounts = {mount["mountPath"]: mount.get("readOnly") for mount in container["volumeMounts"]}
    assert mounts[str(Path(options.model).parent)] and container["env"][0]["value"] in mounts
    service = app.make(Shade(), limits.ServeSettings(queue=options.queue, rate=options.rate))
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert {probe["path"] for probe in probes} <= {getattr(route, "path", "") for route in service.routes}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(options.port)
    assert container["ports"] == [{"name": "http", "containerPort": options.port}]
    (metric,) = [metric["pods"] for metric in scaler["metrics"]]
    published = prometheus.generate_latest(service.state.service.metrics.registry).decode()
    assert f"\n{metric['metric']['name']} " in published
    assert int(metric["target"]["averageValue"]) < options.queue
    assert scaler["scaleTargetRef"]["name"] == documents["Deployment"]["metadata"]["name"]
    labels = pod["metadata"]["labels"]
    assert documents["Service"]["spec"]["selector"] == labels
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"] + options.drain_s
    assert pod["spec"]["terminationGracePeriodSeconds"] > waits


@pytest.mark.parametrize("manifest", sorted(LAUNCH.glob("jobset*.yaml")), ids=lambda path: path.name)
def test_a_jobset_knows_its_coordinator_and_what_to_do_after_75(manifest: Path):
    (document,), (job,) = rendered(manifest), jobs(manifest)
    container = job["spec"]["template"]["spec"]["containers"][0]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    name, (part,) = document["metadata"]["name"], document["spec"]["replicatedJobs"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    if part["replicas"] == 1:
        assert variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-{part['name']}-0-0.{name}:8476"
        assert int(variables["JAX_NUM_PROCESSES"]) == job["spec"]["completions"]
    else:  # launch/env.sh computes them from the variables that GKE sets in the pods of several slices
        assert not [name for name in variables if name.startswith("JAX_") and name != "JAX_COMPILATION_CACHE_DIR"]
    codes = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (codes["values"], codes["containerName"]) == ([cli.REFUSED, cli.PREEMPTED], container["name"])
    # Kubernetes's message about a Job that such a rule ends. The JobSet's rules match this message.
    says = "Container geotoken for pod default/geotoken-workers-0-0-x failed with exit code {} matching FailJob rule"
    refused, other = document["spec"]["failurePolicy"]["rules"]
    (pattern,) = refused["onJobFailureMessagePatterns"]
    assert [bool(re.search(pattern, says.format(code))) for code in codes["values"]] == [True, False]
    assert (refused["action"], other["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")


#: The second host of a slice, one of three slices with two hosts each.
SLICE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "MEGASCALE_NUM_SLICES": "3"}


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "a:1 8 3 5 0"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "a:1 8 3 6,7 0,1"),
        ({"SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "4,5"}, "a:1 8 3 4,5 0,1"),
        ({"SLURM_LOCALID": "1"}, "a:1 8 3"),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "10.0.0.1:8476 2 1"),
        (SLICE | {"MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.s:8080", "MEGASCALE_SLICE_ID": "0"}, "s-0-0.s:8476 6 1"),
        (SLICE | {"MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.s", "MEGASCALE_SLICE_ID": "2"}, "s-0-0.s:8476 6 5"),
        ({}, ""),
    ],
    ids=["a GPU a task", "two GPUs a task", "a node's GPUs a task", "CPUs", "a TPU slice", "first", "third", "alone"],
)
def test_the_environment_says_which_process_of_how_many_this_is(variables: dict[str, str], expected: str):
    if "SLURM_LOCALID" in variables:
        variables = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "JAX_COORDINATOR_ADDRESS": "a:1"} | variables
    names = "COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"
    shown = [f"$JAX_{name}" for name in names] + ["$CUDA_VISIBLE_DEVICES", "$JAX_LOCAL_DEVICE_IDS"]
    print_them = f"echo {' '.join(shown)}"
    assert finish(start(LAUNCH / "run.sh", "bash", "-c", print_them, **variables)) == (0, expected + "\n")


def stubs(folder: Path, **texts: str) -> str:
    """Puts programs of these names first in PATH, to be run in `folder`. Returns the PATH."""
    for name, text in texts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("status", [0, cli.REFUSED])
def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path: Path, status: int):
    """Uses a `gcloud` that refuses the first slice, takes the second away, and runs a worker's script in the third."""
    path = stubs(
        tmp_path,
        gcloud="""echo "$4" >>calls
            case "$4" in
              describe) cat state 2>/dev/null ;;
              create) n=$(grep -c create calls); ((n == 1)) && echo FAILED >state || echo ACTIVE >state ;;
              delete) rm -f state ;;
              ssh)
                last=${@: -1}
                (($(grep -c ssh calls) == 2)) && { bash -c "${last#--command=}"; exit; }
                echo SUSPENDED >state; exit 255 ;;
            esac""",
        curl="[[ $* == *number* ]] && echo 1 || echo a:1:10.0.0.1,b:1:10.0.0.2",
        sudo=f'echo sudo "$@"; [[ $2 != run ]] || exit {status}',
    )
    variables = {"NAME": "n", "ZONE": "z", "TYPE": "v5litepod-256", "IMAGE": "i:1", "NFS": "h:/s", "POLL": "0"}
    code, output = finish(start(LAUNCH / "tpu_vm.sh", "geotoken", "train", "--a=b", PATH=path, **variables))
    calls = (tmp_path / "calls").read_text().split()
    assert code == status, output
    asked_for = ["describe", "delete", "create", "describe"]
    assert calls == asked_for + [*asked_for, "ssh"] * 2
    assert output.index("sudo docker stop geotoken") < output.index("sudo docker run")  # it may be saving
    given = "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "NUM_PROCESSES=2", "PROCESS_ID=1", "i:1 geotoken train --a=b"
    assert all(part in output for part in (*given, "--stop-timeout=120"))


def test_what_xpk_starts_hears_that_it_is_to_end(tmp_path: Path):
    """Uses an `xpk` that starts a command as in its containers (1.16.0), in a shell that passes SIGTERM on."""
    path = stubs(
        tmp_path,
        xpk=f"""cd {ROOT}
            _sigterm() (kill -SIGTERM $! 2>/dev/null)
            trap _sigterm SIGTERM
            last=${{@: -1}}
            (eval "${{last#--command=}}") & PID=$!
            while kill -0 $PID 2>/dev/null; do sleep 0.1; done
            wait $PID""",
    )
    variables = {name: "x" for name in ("CLUSTER", "PROJECT", "ZONE", "IMAGE", "STORAGE")}
    (tmp_path / "train").write_text(f"trap 'exit {cli.PREEMPTED}' TERM\necho begun\nsleep 60 & wait $!\n")
    script = start(LAUNCH / "xpk.sh", "bash", f"{tmp_path}/train", PATH=path, **variables)
    assert script.stdout and script.stdout.readline() == "begun\n"
    script.terminate()  # xpk.sh was replaced by xpk
    assert script.wait(30) == cli.PREEMPTED


def test_jaxlib_knows_every_flag_of_the_environment():
    """Includes the flags for GPUs: all builds of XLA share one list, and an unknown flag aborts."""
    program = "import os, jax; jax.devices(); print(os.environ['XLA_FLAGS'], os.environ['JAX_COMPILATION_CACHE_DIR'])"
    kept = {"ACCELERATOR": "cuda", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    code, output = finish(start(LAUNCH / "run.sh", sys.executable, "-c", program, **kept))
    assert code == 0, output
    assert "scheduler=true --xla_force" in output and output.endswith(f"{ROOT}/runs/compiled\n")


@pytest.mark.parametrize(
    "restarts, asked, status, seen",
    [
        ("0", "exit 0", 0, 1),
        ("2", "exit 75", 75, 3),
        ("2", "exit 2", 2, 1),
        ("0", "(($JAX_PROCESS_ID == 1)) && exit 3; exec sleep 100", 3, 1),  # the others would wait for it
    ],
    ids=["all end", "75 begins again", "2 does not", "one fails"],
)
def test_processes_end_with_the_first_failure(tmp_path: Path, restarts: str, asked: str, status: int, seen: int):
    program = f'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES" >>{tmp_path}/$JAX_PROCESS_ID; {asked}'
    script = [LAUNCH / "processes.sh", "3", "bash", "-c", program]
    began = time.monotonic()
    assert finish(start(*script, RESTARTS=restarts, GRACE="1"))[0] == status
    assert [(tmp_path / str(i)).read_text() for i in range(3)] == [f"{i}/3\n" * seen for i in range(3)]
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_two_processes_go_on_after_a_preemption_as_if_there_had_been_none(tmp_path: Path, unbroken: np.ndarray):
    """One of them gets SIGTERM, as on a host that is taken away."""
    script = start(LAUNCH / "processes.sh", "2", *training(tmp_path, 0.3), RESTARTS="1")
    wait_for_steps(tmp_path, BROKEN)
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    code, output = finish(script)
    assert code == 0 and output.count("starts again") == 1 and "is saved at step" in output, output
    np.testing.assert_array_equal(losses(tmp_path), unbroken)


@pytest.mark.slow
def test_four_processes_end_with_75_when_the_script_is_asked_and_go_on(tmp_path: Path, unbroken: np.ndarray):
    for expected in (cli.PREEMPTED, 0):
        script = start(LAUNCH / "processes.sh", "4", *training(tmp_path, 0.3), RESTARTS="1")
        wait_for_steps(tmp_path, BROKEN)
        if expected:
            script.terminate()
        code, output = finish(script)
        assert code == expected and "starts again" not in output, output
    np.testing.assert_allclose(losses(tmp_path), unbroken, rtol=1e-4)


SLURM = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=8 CoresPerSocket=1 ThreadsPerCore=1 RealMemory=1000
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of two nodes on this host for this user, in which jobs of partition `high` preempt jobs of `low`."""
    if not all(shutil.which(name) for name in ("sbatch", "slurmctld", "slurmd", "munged", "mungekey")):
        pytest.skip("SLURM is not installed (apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-one", "spool-two"):
        (folder / name).mkdir()
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM.format(host=host, ports=ports, user=user, folder=folder))
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "one"],
            ["slurmd", "-D", "-N", "two"],
        )
    ]
    try:
        began = time.monotonic()
        command = ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"]
        while subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() != "2":
            assert time.monotonic() - began < 60, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        subprocess.run(["scancel", f"--user={user}"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)


def submit(slurm: dict[str, str], *arguments: str) -> str:
    own = {k: v for k, v in slurm.items() if not k.startswith(("JAX_", "XLA_"))}
    found = subprocess.run(["sbatch", "--parsable", *arguments], cwd=ROOT, env=own, capture_output=True, text=True)
    assert not found.returncode, found.stderr
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_requeues_a_preempted_job_which_goes_on(tmp_path, slurm, unbroken, nodes):
    """One node gets the signal before the time limit; two nodes are preempted by a job of higher priority."""
    folder, log = tmp_path / "run", tmp_path / "log"
    job = submit(
        slurm, f"--nodes={nodes}", "--ntasks-per-node=2", "--cpus-per-task=1", "--gres=none", f"--output={log}",
        "launch/slurm.sbatch", *training(folder, 1.0),
    )  # fmt: skip
    wait_for_steps(folder, BROKEN)
    if nodes == 1:
        subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    else:
        submit(slurm, "--partition=high", "--output=/dev/null", "--wrap=true")
    began = time.monotonic()
    while "ended with 0" not in log.read_text():
        assert time.monotonic() - began < 240, log.read_text()
        time.sleep(0.2)
    assert log.read_text().count(f"ended with {cli.PREEMPTED}") == 1
    np.testing.assert_allclose(losses(folder), unbroken, rtol=0.0 if nodes == 1 else 1e-4)


if __name__ == "__main__":
    train(*sys.argv[1:])
