"""Threads, processes, sqlite, asyncio, signals: what Python programs ask of their system."""
import asyncio, concurrent.futures, hashlib, mmap, multiprocessing, os, queue, select, shutil, signal, socket
import sqlite3, subprocess, sys, tempfile, threading, time


def part(name):
    print("==", name, flush=True)


def square(n):
    return n * n


def child(conn, n):
    conn.send((os.getpid() != os.getppid(), n * 2))
    conn.close()
    sys.exit(n)


def threads():
    part("threads")
    q, out, lock = queue.Queue(), [], threading.Lock()

    def work():
        while (item := q.get()) is not None:
            with lock:
                out.append(hashlib.sha256(str(item).encode()).hexdigest()[:8])

    ts = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in ts]
    [q.put(i) for i in range(500)]
    [q.put(None) for _ in ts]
    [t.join() for t in ts]
    print(len(out), sorted(out)[:3])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        print(sum(pool.map(square, range(1000))))
    done = threading.Event()
    threading.Timer(0.02, done.set).start()
    print(done.wait(10))


def processes():
    part("subprocess")
    print(subprocess.run(["sh", "-c", "echo out; echo err >&2; exit 3"], capture_output=True))
    p = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    print(len(p.communicate(b"x" * 300000)[0]), p.returncode)
    try:
        subprocess.run(["sleep", "10"], timeout=0.1)
    except subprocess.TimeoutExpired as e:
        print("timeout", e.cmd)
    try:
        subprocess.run(["/no/such/program"])
    except FileNotFoundError as e:
        print(e.errno)
    p = subprocess.Popen(["sleep", "100"], start_new_session=True)
    os.killpg(p.pid, signal.SIGTERM)
    print(p.wait())
    print(subprocess.check_output("seq 1 100 | sort -r | head -2", shell=True))
    a, b = os.pipe()
    p = subprocess.Popen(["sh", "-c", f"echo via fd >&{b}"], pass_fds=[b])
    os.close(b)
    print(os.read(a, 100), p.wait())
    part("multiprocessing")
    for method in ("fork", "spawn"):
        ctx = multiprocessing.get_context(method)
        ours, theirs = ctx.Pipe()
        p = ctx.Process(target=child, args=(theirs, 5))
        p.start()
        theirs.close()
        print(method, ours.recv())
        p.join()
        print(p.exitcode)
        with ctx.Pool(3) as pool:
            print(sum(pool.map(square, range(200), chunksize=10)))
        v = ctx.Value("i", 0)
        ps = [ctx.Process(target=add, args=(v,)) for _ in range(3)]
        [p.start() for p in ps]
        [p.join() for p in ps]
        print(v.value)
    pid = os.fork()
    if pid == 0:
        os._exit(17)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def add(v):
    for _ in range(100):
        with v.get_lock():
            v.value += 1


def database():
    part("sqlite3")
    db = sqlite3.connect("test.db")
    db.execute("pragma journal_mode=wal")
    db.execute("create table t (id integer primary key, name text)")
    with db:
        db.executemany("insert into t (name) values (?)", [(f"name {i}",) for i in range(5000)])
    print(db.execute("select count(*), max(name) from t").fetchone())
    other = sqlite3.connect("test.db", timeout=0.05)
    db.execute("begin immediate")
    try:
        other.execute("insert into t (name) values ('x')")
    except sqlite3.OperationalError as e:
        print(e)
    db.rollback()
    other.execute("insert into t (name) values ('x')")
    other.commit()
    print(db.execute("select count(*) from t").fetchone())
    other.close()
    db.close()
    os.remove("test.db")


async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(line.upper())
        await writer.drain()
    writer.close()


async def client(port, n):
    r, w = await asyncio.open_connection("127.0.0.1", port)
    w.write(b"hello %d\n" % n)
    line = await r.readline()
    w.close()
    return line


async def loops():
    part("asyncio")
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(sorted(await asyncio.gather(*(client(port, n) for n in range(20))))[:2])
    server.close()
    p = await asyncio.create_subprocess_exec("tr", "a-z", "A-Z", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    print(await p.communicate(b"async\n"), p.returncode)
    try:
        await asyncio.wait_for(asyncio.sleep(10), 0.05)
    except asyncio.TimeoutError:
        print("timeout")
    got = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, got.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.wait_for(got.wait(), 10)
    print(await asyncio.to_thread(square, 12))


def signals():
    part("signals")
    seen = []
    signal.signal(signal.SIGUSR2, lambda s, f: seen.append(signal.Signals(s).name))
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    signal.signal(signal.SIGALRM, lambda s, f: seen.append("alarm"))
    time.sleep(0.2)
    print(seen)

    def interrupt(s, f):
        raise InterruptedError("raised")

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    r, w = os.pipe()
    try:
        os.read(r, 1)
    except InterruptedError as e:
        print(e)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR2)
    print(signal.sigpending(), signal.sigwait([signal.SIGUSR2]))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        print("interrupt")


def files():
    part("files")
    with tempfile.TemporaryDirectory(dir=".") as d:
        path = os.path.join(d, "f")
        with open(path, "w+b") as f:
            f.write(bytes(range(256)) * 1000)
            f.flush()
            with mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
                print(len(m), m[1000:1004], m.find(b"\xff\x00"))
        shutil.copytree(d, d + "2")
        print(sorted(os.listdir(d + "2")), os.stat(path).st_size)
        shutil.rmtree(d + "2")
        print([n for _, _, n in os.walk(d)])
    a, b = socket.socketpair()
    a.sendall(b"ping")
    print(select.select([b], [], [], 1)[0] == [b], b.recv(10))
    ep = select.epoll()
    ep.register(a, select.EPOLLIN)
    b.send(b"x")
    print(len(ep.poll(1)))
    print(os.cpu_count() > 0, len(os.urandom(10)), os.getcwd() == os.path.abspath("."))


if __name__ == "__main__":
    threads()
    processes()
    database()
    asyncio.run(loops())
    signals()
    files()
    sys.exit(5)
