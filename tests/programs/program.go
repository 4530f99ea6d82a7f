package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
)

func main() {
	var wg sync.WaitGroup
	sums := make([][32]byte, 50)
	for i := range sums {
		wg.Add(1)
		go func(i int) {
			defer wg.Done()
			sums[i] = sha256.Sum256([]byte(fmt.Sprint(i)))
		}(i)
	}
	wg.Wait()
	fmt.Printf("%x\n", sums[49][:4])
	var keep [][]byte
	for i := 0; i < 200; i++ {
		keep = append(keep, make([]byte, 100000))
		if i%50 == 0 {
			runtime.GC()
			keep = nil
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	total := 0
	for i := 0; i < 10; i++ {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(c, "line %d\n", i)
		s, _ := bufio.NewReader(c).ReadString('\n')
		total += len(s)
		c.Close()
	}
	fmt.Println("echoed", total)
	out, err := exec.Command("sh", "-c", "echo from a child; exit 3").Output()
	fmt.Printf("%s%v\n", out, err)
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGUSR1)
	syscall.Kill(os.Getpid(), syscall.SIGUSR1)
	fmt.Println(<-ch)
	select {
	case <-time.After(30 * time.Millisecond):
		fmt.Println("after")
	}
	os.WriteFile("go.txt", []byte("written"), 0600)
	data, _ := os.ReadFile("go.txt")
	fmt.Println(string(data), runtime.NumCPU() > 0)
	defer func() { fmt.Println("recovered:", recover() != nil); os.Exit(8) }()
	var p *int
	fmt.Println(*p)
}
