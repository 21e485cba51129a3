"""How much longer reading takes when 5 % of the requests go wrong: `python benchmarks/storage_faults.py [--quick]`.

Videos in shards on a local S3 server, read by `read_videos` through a fault-injecting proxy and decoded, with default
settings. Clean and faulty runs take turns; wall time, medians. The faults are those of tests/faulty_s3.py: 500, 503,
resets, silence, cut, stalled, slow and short answers, flipped bits, expired credentials. Bar: at most 2 times as long,
and no wrong byte.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from decode_reference import moving
from faulty_s3 import FaultyS3, faulty_s3
from kinoray.catalog.table import Reference, read_videos
from kinoray.config.shared import ClipConfig, StorageConfig
from kinoray.demo.videos import make_video
from kinoray.storage.objects import Storage
from kinoray.video.frames import decode
from kinoray.video.request import Sampled
from ports import free_port, wait_until

RATE, BAR = 0.05, 2.0
GAP_BYTES = 2**17  # between members, so that each is a request of its own: a shuffled read


@contextmanager
def s3_server() -> Iterator[str]:
    """A moto server of its own process."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(url), 200, "the S3 server answers")
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=1):
        return True


def upload(storage: Storage, uri: str, num_videos: int) -> list[Reference]:
    """One shard with different videos, far apart."""
    shard = bytearray()
    members = []
    for number in range(num_videos):
        data = make_video(moving(60, 128, 170, seed=number % 8), fps=30, gop=12)
        members.append(Reference(uri, len(shard), len(data), hashlib.sha256(data).hexdigest()))
        shard += data + bytes(GAP_BYTES)
    storage.put(uri, bytes(shard))
    return members


def job(storage: Storage, members: list[Reference]) -> tuple[float, int]:
    """(seconds, videos that were not read)"""
    begin, lost = time.perf_counter(), 0
    for data in read_videos(storage, members):
        if isinstance(data, bytes):
            decode(data, Sampled(), ClipConfig()).clip()
        else:
            lost += 1
    return time.perf_counter() - begin, lost


def measure(proxy: FaultyS3, storage: Storage, members: list[Reference], rounds: int) -> dict[str, object]:
    """Clean and faulty runs in turns. Wrong bytes would be lost videos: each member has its checksum."""
    clean, faulty, lost, requests = [], [], 0, 0
    for number in range(rounds):
        proxy.rate = 0.0
        seconds, missing = job(storage, members)
        clean.append(seconds)
        lost += missing
        proxy.rate, proxy.rng = RATE, random.Random(number)
        proxy.requests.clear()
        seconds, missing = job(storage, members)
        faulty.append(seconds)
        lost += missing
        requests += len(proxy.requests)
        print(f"round {number}: clean {clean[-1]:.1f} s, faulty {faulty[-1]:.1f} s", flush=True)
    ratio = statistics.median(b / a for a, b in zip(clean, faulty, strict=True))
    faults = dict(sorted(proxy.met.items()))
    print(f"{requests} requests in the faulty runs; faults met: {faults}")
    return {
        "faulty/clean": {"value": round(ratio, 2), "bar": f"<= {BAR}"},
        "videos lost": {"value": lost, "bar": "= 0"},
        "faults met": sum(faults.values()),
        "ok": ratio <= BAR and lost == 0 and sum(faults.values()) > 0,
    }


def main() -> int:
    """Print the rounds and, last, the ratio beside its bar as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 100 videos instead of 5 of 300")
    quick = parser.parse_args().quick
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    with s3_server() as url, faulty_s3(url) as proxy:
        name = f"bench-{uuid.uuid4().hex[:8]}"
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket=name)
        storage = Storage(StorageConfig(endpoint_url=proxy.url, region="us-east-1", addressing="path"))
        members = upload(storage, f"s3://{name}/shard", 100 if quick else 300)
        result = measure(proxy, storage, members, 3 if quick else 5)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
