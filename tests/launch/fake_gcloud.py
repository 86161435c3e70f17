"""Stands in for `gcloud` in tests: records its arguments, and runs `ssh --command` on hosts that are local processes.

Its folder, FAKE_GCLOUD, holds calls.jsonl (the arguments of each call), NAME.json (a queued resource: state and number
of hosts) and hosts/NAME-N/, the home folder of each host. There is no TPU, so the hosts get the LLMJAX_* variables of a
job. As the real one, it runs a command on all hosts at once and ends with the first failure in the order of the hosts.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["FAKE_GCLOUD"])
NUM_HOSTS = 2


def main() -> int:
    arguments = sys.argv[1:]
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    assert arguments[:3] == ["alpha", "compute", "tpus"], arguments
    group, verb, *rest = arguments[3:]
    if group == "tpu-vm":
        print("\n".join(json.loads(path.read_text())["tpu_vms"] for path in FOLDER.glob("*.json")))
        return 0
    resource = FOLDER / f"{rest[0]}.json"
    if verb == "create":
        if (FOLDER / "no-quota").exists():
            return fail("RESOURCE_EXHAUSTED: quota of TPUs")
        resource.write_text(json.dumps({"state": "WAITING_FOR_RESOURCES", "tpu_vms": "READY"}))
        return 0
    if not resource.exists():
        return fail("NOT_FOUND: Resource was not found")
    if verb == "describe":
        return describe(resource)
    if verb == "delete":
        resource.unlink()
        return 0
    assert verb == "ssh", verb
    [command] = [argument.partition("=")[2] for argument in rest if argument.startswith("--command=")]
    return ssh(rest[0], command)


def fail(message: str) -> int:
    print(f"ERROR: (gcloud.alpha.compute.tpus.queued-resources) {message}", file=sys.stderr)
    return 1


def describe(resource: pathlib.Path) -> int:
    """Print the state, and move one that waits to the next."""
    record = json.loads(resource.read_text())
    print(record["state"])
    following = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}
    record["state"] = following.get(record["state"], record["state"])
    resource.write_text(json.dumps(record))
    return 0


def ssh(name: str, command: str) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(NUM_HOSTS):
        home = FOLDER / "hosts" / f"{name}-{index}"
        home.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HOME": str(home),
            "LLMJAX_COORDINATOR": f"127.0.0.1:{port}",
            "LLMJAX_NUM_PROCESSES": str(NUM_HOSTS),
            "LLMJAX_PROCESS_ID": str(index),
            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        }
        # sshd gives the whole text to the user's shell.
        processes.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=environment))
    statuses = [process.wait() for process in processes]
    for index, status in enumerate(statuses):
        if status:
            print(f"##### Command execution on worker {index} failed with exit status {status}. Continuing.")
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
