"""The client `firecracker-python` makes, uses and deletes a microVM, as its README does it.

    microvm.py FIRECRACKER DIRECTORY KERNEL DISK

It is its own code that makes the tap, starts the process, configures it over the socket and stops it by its PID file. Told
otherwise here are only the places of the binary and of its data, and that this machine has neither Docker nor
an address on the Internet, both of which it looks for and does not use for what is done here.
"""

import os
import subprocess
import sys
import threading
import unittest.mock

import docker
import firecracker.microvm
from firecracker.config import MicroVMConfig

binary, directory, kernel, disk = sys.argv[1:]
MicroVMConfig.__init__.__defaults__ = (directory, binary, f"{directory}/snapshots") + MicroVMConfig.__init__.__defaults__[3:]


class MicroVM(firecracker.microvm.MicroVM):
    @property
    def _boot_args(self):
        """The guest is not Linux: it answers pings to `ip=`."""
        return f"ip={self._ip_addr} echoes=1000000 timeout_ms=600000"


def ping(address):
    subprocess.run(["ping", "-c", "2", "-i", "0.2", "-W", "30", address], check=True)


with unittest.mock.patch.object(docker, "from_env"), unittest.mock.patch.object(
    firecracker.microvm, "get_public_ip", return_value="127.0.0.1"
):
    vm = MicroVM(name="client", kernel_file=kernel, base_rootfs=disk, vcpu=2, memory=64, vsock_enabled=True, mmds_enabled=True, user_data="hello")

created = vm.create()
assert created.endswith(" created"), created
(entry,) = MicroVM.list()
assert entry["name"] == "client" and entry["state"] == "Running", entry
# Its children are not waited for by it, and would stay as zombies, which it takes for living ones.
threading.Thread(target=os.waitpid, args=(entry["pid"], 0), daemon=True).start()
ping("172.16.0.2")

config = vm.config()
assert config["machine-config"]["vcpu_count"] == 2, config
assert config["drives"][0]["drive_id"] == "rootfs" and config["drives"][0]["is_root_device"], config
assert config["network-interfaces"][0]["host_dev_name"] == f"tap_{entry['id']}", config
assert config["vsock"]["guest_cid"] == 3, config
assert config["mmds-config"]["version"] == "V2", config
print("configured")

api = firecracker.microvm.Api(f"{directory}/{entry['id']}/firecracker.socket")
assert api.mmds.get().json()["latest"]["user-data"] == "hello"
assert vm.pause().endswith("paused successfully")
assert api.describe.get().json()["state"] == "Paused"
assert vm.resume().endswith("resumed successfully")
assert api.describe.get().json()["state"] == "Running"
ping("172.16.0.2")
print("paused and resumed")

api.drive.patch(drive_id="rootfs", path_on_host=disk)
try:
    api.drive.patch(drive_id="nope", path_on_host=disk)
    raise SystemExit("a drive that is not there was changed")
except firecracker.exceptions.APIError as e:
    assert "API fault: " in str(e), e
print("changed")

vm.snapshot(action="create")
ping("172.16.0.2")
# It loads into a process that it has: husk lets the restored microVM take the place of the one that is there.
vm.snapshot(action="load")
assert api.describe.get().json()["state"] == "Running"
ping("172.16.0.2")
print("saved and restored")

deleted = vm.delete()
assert deleted.endswith(" is deleted"), deleted
assert MicroVM.list() == []
assert not os.path.exists(f"/proc/{entry['pid']}")
assert not os.path.exists(f"{directory}/{entry['id']}/firecracker.socket")
print("deleted")
