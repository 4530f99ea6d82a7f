"""What multiprocessing makes of semaphores and of memory that is in files: locks, values, arrays, queues, pools."""
import ctypes, mmap, multiprocessing as mp, os, sys, tempfile


def part(name):
    print("==", name, flush=True)


def add(lock, value, array, queue, n):
    for i in range(50):
        with lock:
            value.value += n
        with array.get_lock():
            array[i % len(array)] += n
    queue.put((n, os.getpid() != os.getppid()))


def square(n):
    return n * n


def meet(barrier, condition, ready):
    barrier.wait()
    with condition:
        ready.value += 1
        condition.notify_all()


def main(method):
    part(method)
    ctx = mp.get_context(method)
    lock, value, array, queue = ctx.Lock(), ctx.Value("q", 0), ctx.Array(ctypes.c_long, 7), ctx.Queue()
    kids = [ctx.Process(target=add, args=(lock, value, array, queue, n)) for n in range(1, 4)]
    [kid.start() for kid in kids]
    print(sorted(queue.get() for _ in kids))
    [kid.join() for kid in kids]
    print(value.value, list(array), [kid.exitcode for kid in kids])
    with ctx.Pool(3) as pool:
        print(sum(pool.imap_unordered(square, range(100))))
        print(pool.map(square, range(5)))
    barrier, condition, ready = ctx.Barrier(4), ctx.Condition(), ctx.Value("i", 0)
    kids = [ctx.Process(target=meet, args=(barrier, condition, ready)) for _ in range(3)]
    [kid.start() for kid in kids]
    barrier.wait()
    with condition:
        print(condition.wait_for(lambda: ready.value == 3, 30))
    [kid.join() for kid in kids]
    event = ctx.Event()
    kid = ctx.Process(target=event.set)
    kid.start()
    print(event.wait(30))
    kid.join()


def files():
    part("files")
    with tempfile.TemporaryFile() as file:
        file.truncate(100_000)
        view = mmap.mmap(file.fileno(), 0)
        view[50_000:50_005] = b"hello"
        view.flush()
        if os.fork() == 0:
            view[50_005:50_011] = b" child"
            os._exit(0)
        print(os.wait()[1], bytes(view[50_000:50_011]))
        print(os.pread(file.fileno(), 11, 50_000), os.fstat(file.fileno()).st_size)
        view[0:3] = b"end"
        view.close()
        print(file.read(3))


if __name__ == "__main__":
    files()
    main("fork")
    if len(sys.argv) > 1:
        main("spawn")
    sys.exit(6)
