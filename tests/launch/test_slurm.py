"""The array script under a real SLURM: controller, node daemon and munge, started for the test."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elm_jax.experts import ExpertStore

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm_array.sbatch"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(what: str, ready: object) -> None:
    """Looks every quarter of a second; what never comes ends with the test's own run."""
    while not ready():
        time.sleep(0.25)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a cluster of one node, this machine."""
    sbin = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=sbin) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    host = socket.gethostname().split(".")[0]
    config = tmp_path / "slurm.conf"
    config.write_text(
        CONFIG.format(host=host, folder=tmp_path, ports=free_ports(2), cpus=os.cpu_count())
    )
    (tmp_path / "munge.key").write_bytes(secrets.token_bytes(128))
    (tmp_path / "munge.key").chmod(0o400)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
    files["seed-file"] = "seed"
    options = [f"--{option}={tmp_path}/munge.{name}" for option, name in files.items()]
    # A store of compiled programs for the tests must not hide what a job itself needs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    environment |= {"PATH": sbin, "SLURM_CONF": str(config)}
    with (tmp_path / "daemons.out").open("w") as out:
        daemons = [
            subprocess.Popen(command, env=environment, stdout=out, stderr=out)
            for command in (
                ["munged", "--foreground", "--force", *options],
                ["slurmctld", "-D"],
                ["slurmd", "-D", "-N", host],
            )
        ]
    try:

        def idle() -> bool:
            failed = [d.args[0] for d in daemons if d.poll() is not None]
            assert not failed, f"{failed}: {(tmp_path / 'daemons.out').read_text()}"
            done = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
            )
            return done.stdout.strip() == "idle"

        wait_for("an idle node", idle)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


def test_array_trains_a_fleet_into_one_store(cluster: dict[str, str], tmp_path: Path) -> None:
    names = ["sentiment_inn", "topic_room", "topic_shop"]
    train = ["--backbone", "elm-tiny", "--tasks", *(f"mini:{name}" for name in names)]
    train += ["--store", str(tmp_path / "store"), "--steps", "2", "--batch-size", "4"]
    train += ["--max-examples", "8", "--experts-per-step", "2", "--mesh", "single"]
    command = Path(sys.executable).with_name("elm-jax")

    def submit(*options: str) -> None:
        # One after the other: the tasks of the array share this machine.
        subprocess.run(
            ["sbatch", f"--output={tmp_path}/task-%a.out", *options, str(SCRIPT), *train],
            env=cluster | {"ELM_JAX": str(command)}, check=True, capture_output=True,
        )  # fmt: skip

        def empty() -> bool:
            done = subprocess.run(["squeue", "-h"], env=cluster, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return not done.stdout.strip()

        wait_for("an empty queue", empty)

    submit("--array=0-1%1")
    said = [(tmp_path / f"task-{i}.out").read_text() for i in range(2)]
    store = ExpertStore(tmp_path / "store")
    assert store.ids() == names, said
    assert "sentiment_inn" in said[0] and "topic_room" in said[0] and "topic_shop" in said[1]
    before = {name: store.info(name).checksum for name in names}
    submit("--array=0-1%1")  # again: all is there
    assert {name: store.info(name).checksum for name in names} == before
    assert "there" in (tmp_path / "task-1.out").read_text()
