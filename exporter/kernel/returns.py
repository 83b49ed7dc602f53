"""Where functions return: the offset of every RET instruction. Runs as a child process, which ends at once.

In: on standard input a JSON list of functions, each its machine code in hexadecimal. Out: a JSON list of lists of
offsets. x86-64 instructions differ in length, so each must be decoded to find the next: LLVM's disassembler does it,
which bcc brings along (its library is asked, so that no version of LLVM is named here). It lives in a child because
it holds 60 MB. Started by path, with the standard library alone: 50 ms.

A uretprobe would be simpler, and would crash Go programs: it puts another return address on a stack that Go's runtime
moves and walks.
"""

from __future__ import annotations

import ctypes
import json
import platform
import signal
import subprocess
import sys

_SECONDS = 20  # a machine that is busy; LLVM needs milliseconds
_RETURNS = 64  # of one function; more is none that we look for


def find(codes: list[bytes]) -> list[list[int]]:
    """The offsets of each function's RET instructions, from a child process; empty lists where it failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=json.dumps([code.hex() for code in codes]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return [[] for _ in codes]
    return [list(map(int, offsets)) for offsets in found]


def _x86_64(codes: list[bytes]) -> list[list[int]]:
    llvm = ctypes.CDLL("libbcc.so.0")  # looks names up in the libraries that it needs, too
    for part in ("TargetInfo", "TargetMC", "Disassembler"):
        getattr(llvm, f"LLVMInitializeX86{part}")()
    llvm.LLVMCreateDisasm.restype = ctypes.c_void_p
    llvm.LLVMDisasmInstruction.restype = ctypes.c_size_t
    context = llvm.LLVMCreateDisasm(b"x86_64-unknown-linux-gnu", None, 0, None, None)
    if not context:
        raise OSError("LLVM has no disassembler for x86-64")
    text = ctypes.create_string_buffer(256)
    found = []
    for code in codes:
        buffer = ctypes.create_string_buffer(code, len(code))
        base, at = ctypes.addressof(buffer), 0
        offsets: list[int] = []
        while at < len(code) and len(offsets) <= _RETURNS:
            length = llvm.LLVMDisasmInstruction(
                ctypes.c_void_p(context),
                ctypes.c_void_p(base + at),
                ctypes.c_uint64(len(code) - at),
                ctypes.c_uint64(at),
                text,
                ctypes.c_size_t(len(text)),
            )
            if not length:
                break  # not code: what was found up to here may be wrong, too
            if length == 1 and code[at] == 0xC3:
                offsets.append(at)
            at += length
        found.append(offsets if at >= len(code) and len(offsets) <= _RETURNS else [])
    return found


def _aarch64(codes: list[bytes]) -> list[list[int]]:
    """Every instruction has four bytes; RET X30 is one of them."""
    ret = bytes.fromhex("c0035fd6")
    return [[at for at in range(0, len(code) - 3, 4) if code[at : at + 4] == ret][:_RETURNS] for code in codes]


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    wanted = [bytes.fromhex(code) for code in json.load(sys.stdin)]
    json.dump((_aarch64 if platform.machine() == "aarch64" else _x86_64)(wanted), sys.stdout)
