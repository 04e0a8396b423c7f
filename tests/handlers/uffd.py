"""Serves the memory of a microVM by userfaultfd, by Firecracker's protocol.

    uffd.py SOCKET MEMORY

Says `ready`, then `mapped N` for the regions it is told of, then `served N` at its end: when the microVM is gone.
"""

import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys

UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
PAGEFAULT, REMOVE = 0x12, 0x15

path, memory = sys.argv[1:]
file = os.open(memory, os.O_RDONLY)
image = mmap.mmap(file, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(image))

listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
text, (faults,), _, _ = socket.recv_fds(connection, 1 << 16, 1)
mappings = json.loads(text)
for mapping in mappings:
    assert mapping["page_size"] == mapping["page_size_kib"] == 4096, mapping
print("mapped", len(mappings), flush=True)

served, removed = 0, set()


def serve(page):
    for mapping in mappings:
        offset = page - mapping["base_host_virt_addr"]
        if 0 <= offset < mapping["size"]:
            try:
                if page in removed:
                    fcntl.ioctl(faults, UFFDIO_ZEROPAGE, struct.pack("QQQq", page, 4096, 0, 0))
                else:
                    source = address + mapping["offset"] + offset
                    fcntl.ioctl(faults, UFFDIO_COPY, struct.pack("QQQQq", page, source, 4096, 0, 0))
            except FileExistsError:
                pass
            return
    raise SystemExit(f"a fault at {page:#x}")


while True:
    ready, _, _ = select.select([faults, connection], [], [])
    if connection in ready and not connection.recv(1):
        break
    if faults not in ready:
        continue
    try:
        messages = os.read(faults, 32 * 64)
    except BlockingIOError:
        continue
    for (event, first, second) in struct.iter_unpack("=B7xQQ8x", messages):
        if event == PAGEFAULT:
            serve(second & ~4095)
            served += 1
        elif event == REMOVE:
            removed.update(range(first, second, 4096))
print("served", served, flush=True)
