import java.io.*;
import java.net.*;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

public class Program {
    public static void main(String[] args) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        List<Future<Long>> all = new ArrayList<>();
        for (int i = 0; i < 20; i++) {
            final int n = i;
            all.add(pool.submit(() -> LongStream.rangeClosed(1, 10000L * (n + 1)).map(x -> x * x % 7919).sum()));
        }
        long sum = 0;
        for (Future<Long> f : all) sum += f.get();
        pool.shutdown();
        System.out.println(sum + " " + pool.awaitTermination(10, TimeUnit.SECONDS));
        System.out.println(IntStream.range(0, 100000).parallel().filter(x -> x % 3 == 0).count());
        try (ServerSocket server = new ServerSocket(0, 5, InetAddress.getLoopbackAddress())) {
            Thread t = new Thread(() -> {
                try (Socket s = server.accept()) {
                    s.getInputStream().transferTo(s.getOutputStream());
                } catch (IOException e) {
                    System.out.println(e);
                }
            });
            t.start();
            try (Socket s = new Socket(server.getInetAddress(), server.getLocalPort())) {
                s.getOutputStream().write("through a socket\n".getBytes());
                s.shutdownOutput();
                System.out.print(new String(s.getInputStream().readAllBytes()));
            }
            t.join();
        }
        Process p = new ProcessBuilder("sh", "-c", "cat; exit 6").redirectErrorStream(true).start();
        p.getOutputStream().write("child".getBytes());
        p.getOutputStream().close();
        System.out.println(new String(p.getInputStream().readAllBytes()) + " " + p.waitFor());
        List<byte[]> garbage = new ArrayList<>();
        for (int i = 0; i < 2000; i++) {
            garbage.add(new byte[50000]);
            if (garbage.size() > 100) garbage.clear();
        }
        System.gc();
        Files.write(Path.of("java.txt"), List.of("a", "b"));
        System.out.println(Files.readAllLines(Path.of("java.txt")));
        int[] array = new int[2];
        try {
            Object o = null;
            o.toString();
        } catch (NullPointerException e) {
            System.out.println("null");
        }
        Runtime.getRuntime().addShutdownHook(new Thread(() -> System.out.println("hook")));
        System.exit(array.length + 5);
    }
}
