"""Programs that want all of the machine: `BOMBS` at once, `HOARDS` while nobody waits for them."""

BOMBS = {
    # Each is over some limit; which one may notice first is for the limits.
    "fork": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork_in_shell": "import os; os.system(':(){ :|:& };:'); import time; time.sleep(9)",
    "threads": """
import threading, time
for _ in range(10000): threading.Thread(target=time.sleep, args=(9,)).start()
""",
    "memory": "x = bytearray(10**10)",
    "memory_slowly": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory_forked": """
import os, time
for _ in range(8):
    if os.fork() == 0: break
x = []
while True:
    try: x.append(bytearray(b'x') * (1 << 22))
    except MemoryError: time.sleep(9)
""",
    "memory_in_tmp": """
import os
n = 0
while True:
    with open(f'f{n}', 'wb') as file:
        for _ in range(8): file.write(b'x' * (1 << 20))
    n += 1
""",
    "memory_in_pipes": """
import os, time
kept = []
while True:
    kept.append(os.pipe()); os.set_blocking(kept[-1][1], False); os.write(kept[-1][1], b'x' * (1 << 20))
""",
    "memory_in_sockets": """
import os, socket, time
for _ in range(4): os.fork()
kept = []
while True:
    try:
        kept.append(socket.socketpair())
        for end in kept[-1]: end.setblocking(False)
        for end in kept[-1]:
            for _ in range(100): end.send(b'x' * 4096)
    except BlockingIOError: pass
    except OSError: time.sleep(9)
""",
    "one_large_file": "f = open('f', 'wb')\nwhile True: f.write(b'x' * (1 << 20))",
    "sparse_file": "f = open('f', 'wb'); f.truncate(1 << 40)",
    "many_files": "n = 0\nwhile True:\n    open(str(n), 'w').close(); n += 1",
    "many_folders": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "many_links": "import os\nn = 0\nwhile True: os.symlink('x', str(n)); n += 1",
    "descriptors": "x = []\nwhile True: x.append(open('/dev/null'))",
    "output": "while True: print('x' * 1000)",
    "output_raw": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "output_of_child": "import os\nos.fork()\nos.fork()\nwhile True: os.write(1, b'x' * 65536)",
    "output_of_errors": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "loop": "while True: pass",
    "loop_that_ignores_signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "loop_that_catches_all": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "loop_in_c": "sum(range(10**12))",
    "regular_expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "large_power": "print(len(str(9**9**9)))",
    "sleep": "import time; time.sleep(1000)",
    "sleep_with_closed_output": "import os, time; os.close(1); os.close(2); time.sleep(1000)",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "wait_for_input": "import sys, os; r, w = os.pipe(); os.read(r, 1)",
    "deadlock": "import threading; l = threading.Lock(); l.acquire(); l.acquire()",
    "exit_that_hangs": "import atexit, time; atexit.register(time.sleep, 1000)",
    "thread_that_stays": "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()",
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "recursion_in_c": "x = []\nfor _ in range(10**7): x = [x]\nrepr(x)",
    "deep_source": "eval('(' * 10**6 + ')' * 10**6)",
    "crash": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "kill_self": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "exit_code": "import sys; sys.exit(3)",
    "exit_text": "raise SystemExit('text')",
}

_HOARD = """
import gc, os, time
def hoard():
    for _ in range(8):
        if os.fork() == 0:
            try: x = bytearray(b'x') * (60 << 20); time.sleep(60)
            finally: os._exit(0)
def part(name): return next(o for o in gc.get_objects() if isinstance(o, type) and o.__name__ == name)
"""
HOARDS = {
    # A program that a check calls, and the check.
    "while_it_does_not_read": (
        _HOARD
        + """
read, times = part('Channel').receive, []
def receive(channel):
    times.append(1)
    if len(times) == 2: hoard(); time.sleep(60)
    return read(channel)
part('Channel').receive = receive
def f(text): return text
""",
        "f('x' * 1_000_000)",
    ),
    "while_the_check_is_busy": (
        _HOARD
        + """
hoard()
names = part('Answers').answer
same_hash = [{'int': hex(n * (2**61 - 1))} for n in range(60000)]
def answer(self, question):
    return {'value': {'set': same_hash}} if question['operation'] == 'call' else names(self, question)
part('Answers').answer = answer
def f(): return 0
""",
        "f()",
    ),
    "between_quick_answers": (_HOARD + "hoard()\ndef f():\n    while True: yield 0", "for item in f(): pass"),
}
