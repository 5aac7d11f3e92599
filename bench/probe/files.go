package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const largeFile = "/root/probe-large"

// writeFile prints how many nanoseconds it takes to write a file of n MiB.
func writeFile(n int) error {
	piece := make([]byte, 256<<10)
	begin := time.Now()
	f, err := os.Create(largeFile)
	if err != nil {
		return err
	}
	defer f.Close()
	for range n * 4 {
		if _, err := f.Write(piece); err != nil {
			return err
		}
	}
	fmt.Println(time.Since(begin).Nanoseconds())
	return nil
}

// readFile prints how many nanoseconds it takes to read the file that writeFile
// wrote, which must have n MiB.
func readFile(n int) error {
	begin := time.Now()
	f, err := os.Open(largeFile)
	if err != nil {
		return err
	}
	defer f.Close()
	read, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 256<<10))
	if err == nil && read != int64(n)<<20 {
		err = fmt.Errorf("%s has %d bytes, not %d MiB", largeFile, read, n)
	}
	if err != nil {
		return err
	}
	fmt.Println(time.Since(begin).Nanoseconds())
	return nil
}

// smallFiles prints how many nanoseconds it takes to write n files of 4 KiB,
// each as an upload does it: beside its place, then renamed into it.
func smallFiles(n int) error {
	dir, err := os.MkdirTemp("/root", "probe-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	content := make([]byte, 4<<10)
	begin := time.Now()
	for i := range n {
		path := filepath.Join(dir, strconv.Itoa(i))
		if err := os.WriteFile(path+".new", content, 0o644); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	fmt.Println(time.Since(begin).Nanoseconds())
	return nil
}
