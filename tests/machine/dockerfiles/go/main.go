package main

import (
	"fmt"
	"runtime"
)

func main() { fmt.Println(42, runtime.GOARCH) }
