#!/usr/bin/env python3
"""Print a JobSet that trains on a GKE cluster: TPU slices, or hosts with or without GPUs."""

import argparse
import math
import pathlib
import re
import sys
from typing import Any

import yaml

from llmjax.errors import UserError
from llmjax.plan import topology

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # launch/ is no package
from command_line import Parser, count, positive
from restarts import NEVER, PREEMPTED

GRACE_SECONDS = 120  # from SIGTERM to SIGKILL: a checkpoint must be saved within it
INIT_SECONDS = 1800  # pods that have a node wait so long for those whose nodes are being started
COORDINATOR_PORT = 8482
CONTAINER = "llmjax"
SPOT = "cloud.google.com/gke-spot"
# The label of each TPU generation on GKE's nodes.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}

HELP = """\
Prints the manifest of a JobSet, one pod a host. The cluster needs the JobSet controller; --queue needs Kueue.

  python launch/gke/render.py --name=a --image=IMAGE --topology=v6e:4x4 --claim=store:/store --queue=tpus \\
      -- llmjax train --config=llama:1B --workdir=gs://BUCKET/runs/a --config.data.store=/store \\
      --config.data.sources.main.path='/my/texts/**/*.txt' | kubectl apply -f -

On TPUs llmjax finds the other hosts by the variables that GKE sets (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, MEGASCALE_*),
so the manifest sets none of its own. Without --topology, --hosts says how many hosts the job has, --gpus how many GPUs
each of them, and the manifest sets LLMJAX_COORDINATOR, LLMJAX_NUM_PROCESSES and LLMJAX_PROCESS_ID.

Exit statuses of a pod: 76, 77 and 78 end the JobSet, 85 (stopped and saved) restarts the pod and is not counted, any
other restarts all pods, at most --max-restarts times.
"""


def main(arguments: list[str]) -> int:
    """Print the manifest of the command line's job."""
    print(yaml.safe_dump(jobset(parse(arguments)), sort_keys=False), end="")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The checked options, with `command` as the list of what every pod runs and `slice` as the parsed topology."""
    parser = Parser(
        prog="launch/gke/render.py",
        usage="launch/gke/render.py --name=NAME --image=IMAGE (--topology=TPU:SHAPE | --hosts=N) [options] -- COMMAND",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, type=dns_label, help="name of the JobSet")
    parser.add_argument("--image", required=True, help="image with llmjax, such as that of launch/docker/Dockerfile")
    machines = parser.add_mutually_exclusive_group(required=True)
    machines.add_argument("--topology", metavar="TPU:SHAPE", help="TPU slice as in `llmjax plan`, such as v6e:4x4")
    machines.add_argument("--hosts", type=positive, metavar="N", help="hosts without TPUs")
    parser.add_argument("--slices", type=positive, default=1, metavar="N", help="TPU slices (default 1)")
    parser.add_argument("--gpus", type=count, default=0, metavar="N", help="GPUs of each host (default 0)")
    parser.add_argument("--spot", action="store_true", help="run on spot nodes")
    parser.add_argument("--queue", type=dns_label, metavar="NAME", help="Kueue's local queue")
    parser.add_argument("--claim", type=claim, metavar="NAME:PATH", help="mount a PersistentVolumeClaim at a path")
    parser.add_argument(
        "--service-account", type=dns_label, metavar="NAME", help="that may use the bucket of --workdir"
    )
    parser.add_argument("--max-restarts", type=count, default=10, metavar="N", help="after crashes (default 10)")
    options = parser.parse_job(arguments, "every pod")
    if options.topology is None and options.slices > 1:
        parser.error(f"--slices={options.slices}: only TPUs have slices; leave it out, or give --topology")
    if options.topology is not None and options.gpus:
        parser.error(f"--gpus={options.gpus}: a host has TPUs or GPUs; give --topology or --gpus")
    try:
        options.slice = topology.parse(options.topology) if options.topology else None
    except UserError as error:
        parser.error(str(error))
    if options.slice is not None and options.slice.platform != "tpu":
        parser.error(f"--topology={options.topology}: expected TPUs; give --hosts and --gpus for other machines")
    return options


def dns_label(text: str) -> str:
    """The type of a flag: a name in Kubernetes that leaves room for the suffixes of its pods."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of up to 40 lower-case letters, digits and hyphens")
    return text


def claim(text: str) -> tuple[str, str]:
    """The type of a flag: the name of a claim and an absolute path."""
    name, _, path = text.partition(":")
    if not pathlib.PurePosixPath(path).is_absolute():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:PATH with an absolute path, such as texts:/data")
    return dns_label(name), path


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: one Job for each slice, all of which restart together."""
    metadata: dict[str, Any] = {"name": options.name}
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if options.slice is not None:  # a slice is a node pool, and a Job needs one for itself
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "restartStrategy": "BlockingRecreate",  # no old pod of the job may meet a new one
                "rules": [
                    {"name": "neverRestart", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job(options)}}],
        },
    }


def job(options: argparse.Namespace) -> dict[str, Any]:
    """The spec of the Job of one slice: a pod for each host. Any failure ends it and so restarts the JobSet."""
    hosts = options.hosts if options.slice is None else num_hosts(options.slice)
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        # Of these rules the first that matches a pod counts.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": exit_codes(list(NEVER))},
                {"action": "Ignore", "onExitCodes": exit_codes([PREEMPTED])},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod(options)},
    }


def exit_codes(values: list[int]) -> dict[str, Any]:
    """A requirement of podFailurePolicy."""
    return {"containerName": CONTAINER, "operator": "In", "values": values}


def num_hosts(tpu: topology.Topology) -> int:
    """Hosts of a TPU slice: they have four chips, or a single one."""
    return math.ceil(math.prod(tpu.dims) / 4)


def pod(options: argparse.Namespace) -> dict[str, Any]:
    """The spec of a pod."""
    selector: dict[str, str] = {}
    devices: dict[str, int] = {"nvidia.com/gpu": options.gpus} if options.gpus else {}
    if options.slice is not None:
        generation, _, shape = options.slice.name.partition(":")
        selector["cloud.google.com/gke-tpu-accelerator"] = ACCELERATORS[generation]
        selector["cloud.google.com/gke-tpu-topology"] = shape
        devices = {"google.com/tpu": min(4, math.prod(options.slice.dims))}
    if options.spot:
        selector[SPOT] = "true"
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": options.image,
        "command": options.command,
        "env": environment(options),
    }
    if devices:
        container["resources"] = {"requests": devices, "limits": dict(devices)}
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_SECONDS}
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if selector:
        spec["nodeSelector"] = selector
    if options.spot:
        spec["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if options.claim:
        name, path = options.claim
        spec["volumes"] = [{"name": "claim", "persistentVolumeClaim": {"claimName": name}}]
        container["volumeMounts"] = [{"name": "claim", "mountPath": path}]
    return spec | {"containers": [container]}


def environment(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Variables of the container. On TPUs none that describes the job: llmjax detects it by those that GKE sets."""
    variables: dict[str, Any] = {"LLMJAX_INIT_SECONDS": {"value": str(INIT_SECONDS)}}
    if options.slice is None:
        # JobSet names pods JOBSET-REPLICATEDJOB-JOB-POD, in the domain of a service with the name of the JobSet.
        variables |= {
            "LLMJAX_COORDINATOR": {"value": f"{options.name}-slice-0-0.{options.name}:{COORDINATOR_PORT}"},
            "LLMJAX_NUM_PROCESSES": {"value": str(options.hosts)},
            "LLMJAX_PROCESS_ID": {
                "valueFrom": {
                    "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
                }
            },
        }
    return [{"name": name, **source} for name, source in variables.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
