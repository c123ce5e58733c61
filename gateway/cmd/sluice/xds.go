//go:build !noxds

package main

// Back ends whose address is xds:///name. It makes the program larger by 20 MB;
// the build tag noxds leaves it out.
import _ "google.golang.org/grpc/xds"
