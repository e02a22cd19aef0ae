// A program with enough of the standard library in it to keep the compiler busy.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
)

func main() {
	facts := map[string]string{"os": runtime.GOOS, "arch": runtime.GOARCH, "version": runtime.Version()}
	if err := json.NewEncoder(os.Stdout).Encode(facts); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
