"""The one place that starts or joins Ray, with the settings that every job shares; and nodes that are waited for.

What is easy to break: what is asked of an autoscaler must end with the job. `ray.autoscaler.sdk.request_resources` is
one slot for the whole cluster: it would replace what others asked for, and hold paid nodes after a driver was killed. A
placement group is the job's own, and goes with it. And Ray keeps the place of workers whose controller was killed until
the whole job ends: kinoray.cluster.lines gives it back.
"""

import atexit
import contextlib
import inspect
import logging
import math
import os
import secrets
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import parameter, ray_constants, services, utils
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import OutOfMemoryError, RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.job_config import JobConfig
from ray.util.placement_group import placement_group, remove_placement_group

from kinoray.config.shared import WorkersConfig
from kinoray.console import format_duration, keep_native_messages, many, visible
from kinoray.errors import ClusterError, ConfigError
from kinoray.storage.leftovers import Claim, reap, sweep

if TYPE_CHECKING:
    from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply

__all__ = [
    "OUT_OF_MEMORY",
    "WORKER_ENV",
    "Kept",
    "bring_nodes",
    "connect",
    "disconnect",
    "has_autoscaler",
    "loss_of",
    "own_session",
    "private_token_file",
    "quiet_ray",
    "refuses",
    "require_fit",
    "shortage",
    "starting",
]

WORKER_ENV = {
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # the default starts 32 actors to read one file
    "RAY_DATA_PARQUET_BIN_PACKING_BYTES": str(32 * 2**20),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_COLOR_PREFIX": "0",  # a stranger's text may not colour the terminal, so Ray does not either
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else train workers leave the job's folder, and PYTHONPATH=platform:models with it
}
"""Environment of every worker; never holds a secret, since the jobs API shows it."""

_LOGGERS = ("ray", "ray.data", "ray._private.authentication", "ray.train", "ray.tune")
_claims: list[Claim] = []  # on the session folder of a Ray that was started here


def quiet_ray() -> None:
    """Keep the chatter of Ray Data out of a job's output: our progress lines and Ray's errors remain.

    Call it in every process that builds a Dataset (the settings travel with that process's DataContext).
    """
    import ray.data  # here: it takes a second, and pandas, which only a training needs

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    _quiet_loggers()


def _quiet_loggers() -> None:
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class _Job(JobConfig):  # type: ignore[misc]  # ray is not typed
    """A job whose workers import from where this process does, and from nowhere else.

    Ray would add the working folder, ahead of everything else: a library with a torch.py in it would be code.
    """

    _py_driver_sys_path: list[str]

    def _serialize(self) -> bytes:
        own = {os.path.realpath(entry) for entry in sys.path}  # "" is the working folder
        self._py_driver_sys_path[:] = [entry for entry in self._py_driver_sys_path if os.path.realpath(entry) in own]
        return bytes(super()._serialize())


def connect(config: WorkersConfig) -> None:
    """Join the configured cluster, or start a Ray on this machine; nothing happens where one is joined already.

    Raises:
        ClusterError: the address does not answer, or a Ray of its own does not start.
        ConfigError: a token file for a Ray of its own cannot be written.
    """
    if ray.is_initialized():
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in WORKER_ENV.items()})
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _quiet_loggers()
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not address and _makes_token():
        private_token_file()
    begun = time.monotonic()
    try:
        if address:
            print(f"resources: joining the cluster at {visible(address)}", flush=True)
            ray.init(
                address=address,
                runtime_env={"env_vars": WORKER_ENV},
                job_config=None if "://" in address else _Job(),  # a Ray client's server does not know our class
                log_to_driver=False,  # errors and progress come to the driver by themselves; the rest is Ray's own
                logging_level=logging.ERROR,
                logging_config=_logging(config),
            )
        else:  # "local", so that it never joins a stranger's cluster
            print(
                f"resources: starting Ray on this machine with {config.local_cpus} task slots (local_cpus)", flush=True
            )
            reap("starting", f"{get_default_ray_temp_dir()}/session_*_{os.getpid()}")
            with _small():
                ray.init(
                    address="local",
                    num_cpus=config.local_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    logging_config=_logging(config),
                    job_config=_Job(),
                )  # without runtime_env, which would leave the workers that Ray starts ahead unused
            _clean_up_after()
    except Exception as error:  # a node that does not start in time is a bare Exception in Ray
        reap("started", "")  # its folder has what went wrong
        doing = f"resources.address {address!r} cannot be joined" if address else "Ray does not start on this machine"
        raise ClusterError(f"{doing}: {error}") from error
    _quiet_loggers()  # again: ray.init sets its loggers up anew
    if node := ray._private.worker._global_node:  # none behind a Ray client's server
        _keep_messages(Path(node.get_logs_dir_path()))
        took = format_duration(time.monotonic() - begun)
        print(f"resources: Ray is there after {took}; what it logs is in {node.get_logs_dir_path()}", flush=True)


def _keep_messages(folder: Path) -> None:
    """Keep in a file what Ray's native code and its loggers write to stderr, where this process is a command's."""
    colours = ray._private.worker.colorama  # Ray's own copy; it would print a colour code when all is said
    atexit.unregister(colours.initialise.reset_all)
    path = folder / f"kinoray-{os.getpid()}.err"
    if file := keep_native_messages(path):
        warnings.filterwarnings("ignore", module=r"ray\.")
        for name in _LOGGERS:
            for handler in logging.getLogger(name).handlers:
                if type(handler) is not logging.FileHandler and isinstance(handler, logging.StreamHandler):
                    handler.setStream(file)
        ray._private.worker.print_to_stdstream = Kept(file, path)


class Kept:
    """In place of what prints raylets' messages: they go to the file, and people hear once that there are some.

    Not of mere warnings, such as that many workers were started.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._is_told = False

    def __call__(self, data: Mapping[str, Any], *_: object, **__: object) -> None:
        print("\n".join(data["lines"]), file=self._file)
        if not self._is_told and not all(line.startswith("WARNING: ") for line in data["lines"]):
            self._is_told = True
            print(f"resources: a worker died, or Ray met other trouble; it is in {self._path}", flush=True)


_SMALL = {
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    "RAY_prestart_worker_first_driver": "0",  # of workers, as many as there are CPUs, beside those that are asked for
}


_AGENTS = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
_PORTS = range(20_000, 32_000)
_PATCHED = (
    (ray_constants, "ENABLE_RAY_CLUSTER"),
    (services, "start_api_server"),
    (services, "get_node"),
    (utils, "get_dashboard_dependency_error"),
    (parameter, "RayParams"),
)
_REGISTERS_S, _LOOK_S = 10.0, 0.02


@contextlib.contextmanager
def _small() -> Iterator[None]:
    """Ray that is started here is small, and takes 127.0.0.1 for its node's address: no port of it listens elsewhere.

    ray.init replaces a _node_ip_address of 127.0.0.1 by the machine's. The switch, which Ray itself turns off on macOS
    and Windows so that no firewall asks, is read from the environment when ray is imported, which has happened. And it
    starts a dashboard without pages, an autoscaler and a log monitor, whatever one asks it for: three processes that
    nobody here needs, and waits for the first of them; and for two agents, unless their ports are given; and imports
    the dashboard's packages to see whether they are there, as kinoray asks for them; and looks once a second whether
    the node is there. Those are more than half of ray.init's seconds. A Ray that is made otherwise starts as it does.
    """
    saved = {name: os.environ.get(name) for name in _SMALL}
    given = [(module, name, getattr(module, name)) for module, name in _PATCHED if hasattr(module, name)]
    os.environ.update(_SMALL)
    ray_constants.ENABLE_RAY_CLUSTER = False
    switches = {"no_monitor": True, "include_log_monitor": False}
    known = inspect.signature(parameter.RayParams).parameters
    if len(given) == len(_PATCHED) and known.keys() >= {*switches, *_AGENTS}:
        services.start_api_server = lambda *_, **__: (None, None)  # as where it does not start
        services.get_node = partial(_get_node, services.get_node)
        utils.get_dashboard_dependency_error = lambda: None
        ports = dict(zip(_AGENTS, _free_ports(len(_AGENTS)), strict=True))
        parameter.RayParams = partial(parameter.RayParams, **switches, **ports)
    try:
        yield
    finally:
        for module, name, value in given:
            setattr(module, name, value)
        for name, value in saved.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _get_node(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """Ray's own `get_node`, as soon as it has something to say."""
    client, end_s = GcsClient(address=gcs_address), time.monotonic() + _REGISTERS_S
    with contextlib.suppress(RayError):  # which it meets, too
        while not client.get_all_node_info(timeout=_REGISTERS_S) and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
    return get_node(gcs_address, node_id)


def _free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at: below those that are given out to who asks for any."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found = [*(one for one in found if one != port), port]
    return found


def _makes_token() -> bool:
    """Whether a Ray that starts here would make itself a token file, which others could read.

    Without RAY_AUTH_MODE it does so, too.
    """
    is_given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return not is_given and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def private_token_file() -> Path:
    """Ray's token file of this user, mode 0600, made if there is none; Ray itself would let others read it.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be written: {error.strerror or error}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return path


def _logging(config: WorkersConfig) -> "ray.LoggingConfig | None":
    """How all processes of the job log; see `kinoray.console.log_event`."""
    if config.logs == "off":
        return None
    return ray.LoggingConfig(encoding="JSON", log_level="INFO", additional_log_standard_attrs=["name"])


def _clean_up_after() -> None:
    """See to it that nothing of the Ray that was started here outlives this process, and clean up after others."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    _claims.append(Claim(session))
    reap("session", str(session))
    sweep(session.parent.glob("session_*"))


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


def require_fit(config: WorkersConfig, *, decode_cpus: float = 0.0) -> None:
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
        if " GPU = " in missing() and not joined:
            remedy = "leave resources.gpus_per_worker out, and the model runs on CPUs"
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


def shortage(config: WorkersConfig, have: Mapping[str, float], *, decode_cpus: float = 0.0) -> str:
    """What a job asks for and a cluster with these resources lacks, as a sum; "" where it fits."""
    cpus = config.num_workers * config.cpus_per_worker + decode_cpus
    gpus = config.num_workers * config.gpus_per_worker
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > have.get(kind, 0.0):
            each = config.cpus_per_worker if kind == "CPU" else config.gpus_per_worker
            decode = f" + {decode_cpus:g} to decode" if kind == "CPU" and decode_cpus else ""
            return (
                f"resources: {many(config.num_workers, 'worker')} x {each:g} {kind}{decode} = {needed:g} {kind}, but "
                f"the cluster has {have.get(kind, 0.0):g}"
            )
    return ""


OUT_OF_MEMORY = "the machine ran out of memory, and Ray ended workers"


def loss_of(error: BaseException) -> str:
    """Why Ray lost workers, in a line: what it says of memory is a page."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return OUT_OF_MEMORY
    return text[:300]


_NODES_POLL_S = 1.0
_SAY_S = 30.0
_ANSWER_S = 10.0
_REFUSED_S = 10.0  # a refusal that lasts: while nodes end, their places are not free yet


def has_autoscaler() -> bool:
    """Whether something starts and ends nodes of the joined cluster: such nodes carry an id of their provider."""
    from ray.core.generated.autoscaler_pb2 import NodeStatus  # here: it takes a tenth of a second

    nodes = _status().cluster_resource_state.node_states
    return any(node.instance_id for node in nodes if node.status != NodeStatus.DEAD)


def bring_nodes(bundles: Sequence[Mapping[str, float]], shortage: Callable[[], str], *, limit_s: float) -> str:
    """Have the autoscaler start nodes that hold these bundles, such as {"CPU": 1.0}; waits while `shortage` says more.

    What the nodes have is free again on return: the job takes it from there.

    Returns:
        "" once there is no shortage, else why it is not waited for any longer.
    """
    claim = placement_group([{kind: count for kind, count in bundle.items() if count} for bundle in bundles])
    try:
        return _wait(claim.id.hex(), shortage, limit_s)
    finally:
        remove_placement_group(claim)


def _wait(claim: str, shortage: Callable[[], str], limit_s: float) -> str:
    begun, said, said_s = time.monotonic(), "", -_SAY_S
    held_s = begun  # when the autoscaler last seemed to be able to
    while missing := shortage():
        state = _status().autoscaling_state
        now = time.monotonic()
        if not refuses(state, claim) or _others_work():
            held_s = now
        if now - held_s > _REFUSED_S:
            return (
                "its autoscaler may not start the nodes for that; raise max_workers of its node types, or ask for less"
            )
        if now - begun > limit_s:
            return (
                f"nodes did not come within resources.wait_for_nodes_s, {format_duration(limit_s)} "
                f"({starting(state)}); `ray status` on the head says more; the same command tries again"
            )
        line = f"{missing}; waiting for nodes, {starting(state)}"
        if line != said or now - said_s >= _SAY_S:
            print(f"{line} ({format_duration(now - begun)} of {format_duration(limit_s)})", flush=True)
            said, said_s = line, now
        time.sleep(_NODES_POLL_S)
    if said:
        print(f"resources: the nodes are there after {format_duration(time.monotonic() - begun)}", flush=True)
    return ""


def refuses(state: "AutoscalingState", claim: str) -> bool:
    """Whether the autoscaler has found that it may start no nodes that hold the placement group with this id."""
    return any(claim in request.details for request in state.infeasible_gang_resource_requests)


def starting(state: "AutoscalingState") -> str:
    """What the autoscaler is about, in words: `2 decode starting`, `none starting, gpu failed: no capacity`."""
    types = Counter(node.ray_node_type_name for node in state.pending_instances)
    for request in state.pending_instance_requests:
        types[request.ray_node_type_name] += request.count
    named = ", ".join(f"{count} {name}" for name, count in sorted(types.items())) or "none"
    failed = [f", {one.ray_node_type_name} failed: {one.reason}" for one in state.failed_instance_requests]
    return f"{named} starting{''.join(failed[-1:])}"


def _others_work() -> bool:
    """Whether other jobs hold something now: what they give back may be what is missing."""
    free = ray.available_resources()
    return any(free.get(kind, 0.0) < count for kind, count in ray.cluster_resources().items() if kind in ("CPU", "GPU"))


def _status() -> "GetClusterStatusReply":
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_ANSWER_S))
    return reply
