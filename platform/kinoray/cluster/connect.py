"""The one place that starts or joins Ray, with the settings that every job shares."""

import atexit
import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
import ray.data
from ray._private import ray_constants

from kinoray.cluster.autoscaler import bring_nodes, has_autoscaler
from kinoray.cluster.token import private_token_file
from kinoray.config.shared import ResourcesConfig
from kinoray.errors import ClusterError
from kinoray.storage.leftovers import Claim, reap, sweep

_claims: list[Claim] = []  # on the session folder of a Ray that was started here

__all__ = ["WORKER_ENV", "connect", "disconnect", "own_session", "quiet_ray", "require_fit", "shortage"]

WORKER_ENV = {
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # the default starts 32 actors to read one file
    "RAY_DATA_PARQUET_BIN_PACKING_BYTES": str(32 * 2**20),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_COLOR_PREFIX": "0",  # a stranger's text may not colour the terminal, so Ray does not either
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else train workers leave the job's folder, and PYTHONPATH=platform:models with it
}
"""Environment of every worker; never holds a secret, since the jobs API shows it."""


def quiet_ray() -> None:
    """Keep Ray's own chatter out of a job's output: our progress lines and Ray's errors remain.

    Call it in every process that builds a Dataset (the settings travel with that process's DataContext).
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data", "ray._private.authentication", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(config: ResourcesConfig) -> None:
    """Join the configured cluster, or start a Ray on this machine; nothing happens where one is joined already.

    Raises:
        ClusterError: the address does not answer, or a Ray of its own does not start.
        ConfigError: a token file for a Ray of its own cannot be written.
    """
    if ray.is_initialized():
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in WORKER_ENV.items()})
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet_ray()
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not address and _makes_token():
        private_token_file()
    try:
        if address:
            ray.init(
                address=address,
                runtime_env={"env_vars": WORKER_ENV},
                log_to_driver=True,
                logging_config=_logging(config),
            )
        else:  # "local", so that it never joins a stranger's cluster
            with _on_loopback():
                ray.init(
                    address="local",
                    num_cpus=config.local_cpus,
                    include_dashboard=False,
                    log_to_driver=False,  # errors and progress come to the driver by themselves; the rest is Ray's own
                    logging_level=logging.ERROR,
                    logging_config=_logging(config),
                    runtime_env={"env_vars": WORKER_ENV},
                )
            _clean_up_after()
    except Exception as error:  # a node that does not start in time is a bare Exception in Ray
        doing = f"resources.address {address!r} cannot be joined" if address else "Ray does not start on this machine"
        raise ClusterError(f"{doing}: {error}") from error
    quiet_ray()  # again: ray.init sets its loggers up anew


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray that is started here takes 127.0.0.1 for its node's address, and none of its ports listens elsewhere.

    ray.init replaces a _node_ip_address of 127.0.0.1 by the machine's. This switch, which Ray itself turns off on macOS
    and Windows so that no firewall asks, is read from the environment when ray is imported, which has happened.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    saved, ray_constants.ENABLE_RAY_CLUSTER = (os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER), False
    os.environ[name] = "0"
    try:
        yield
    finally:
        given, ray_constants.ENABLE_RAY_CLUSTER = saved
        os.environ.pop(name)
        if given is not None:
            os.environ[name] = given


def _makes_token() -> bool:
    """Whether a Ray that starts here would make itself a token file, which others could read.

    Without RAY_AUTH_MODE it does so, too.
    """
    is_given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return not is_given and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _logging(config: ResourcesConfig) -> "ray.LoggingConfig | None":
    """How all processes of the job log; see `kinoray.cluster.events`."""
    if config.logs == "off":
        return None
    return ray.LoggingConfig(encoding="JSON", log_level="INFO", additional_log_standard_attrs=["name"])


def _clean_up_after() -> None:
    """See to it that nothing of the Ray that was started here outlives this process, and clean up after others."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    _claims.append(Claim(session))
    reap("session", str(session))
    sweep(session.parent)


@atexit.register
def _release() -> None:
    """At an end that is no kill, the session's folder stays, with its logs, as Ray leaves it."""
    while _claims:
        _claims.pop().release()


def disconnect() -> None:
    """Leave the cluster; a Ray that `connect` started ends with it."""
    ray.shutdown()
    _release()


@contextlib.contextmanager
def own_session() -> Iterator[None]:
    """What its body starts or joins is left behind it; a cluster that was joined before stays so."""
    joined = ray.is_initialized()
    try:
        yield
    finally:
        if not joined:
            disconnect()


def require_fit(config: ResourcesConfig, *, decode_cpus: float = 0.0) -> None:
    """Refuse a job that the cluster can never hold: Ray itself would wait for ever without a word.

    Where the cluster has an autoscaler, the job's nodes are asked for and waited for, config.wait_for_nodes_s at most.

    Raises:
        ClusterError: with the sum that does not fit.
    """

    def missing() -> str:
        return shortage(config, ray.cluster_resources(), decode_cpus=decode_cpus)

    if not missing():
        return
    joined = config.address or os.environ.get("RAY_ADDRESS", "")
    if not (joined and has_autoscaler()):
        remedy = "add nodes" if joined else "raise resources.local_cpus"
        raise ClusterError(f"{missing()}; lower resources.num_workers or {remedy}")
    if not config.wait_for_nodes_s:
        raise ClusterError(
            f"{missing()}, and resources.wait_for_nodes_s is 0: let the job wait, or bring nodes up first"
        )
    worker = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    bundles = [worker] * config.num_workers + [{"CPU": 1.0}] * math.ceil(decode_cpus)
    reason = bring_nodes(bundles, missing, limit_s=config.wait_for_nodes_s)
    if reason:
        raise ClusterError(f"{missing()}; {reason}")


def shortage(config: ResourcesConfig, have: Mapping[str, float], *, decode_cpus: float = 0.0) -> str:
    """What a job asks for and a cluster with these resources lacks, as a sum; "" where it fits."""
    cpus = config.num_workers * config.cpus_per_worker + decode_cpus
    gpus = config.num_workers * config.gpus_per_worker
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > have.get(kind, 0.0):
            each = config.cpus_per_worker if kind == "CPU" else config.gpus_per_worker
            decode = f" + {decode_cpus:g} to decode" if kind == "CPU" and decode_cpus else ""
            return (
                f"resources: {config.num_workers} workers x {each:g} {kind}{decode} = {needed:g} {kind}, but "
                f"the cluster has {have.get(kind, 0.0):g}"
            )
    return ""
