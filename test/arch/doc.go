// Package arch holds the rules of who may import whom, and a test that reads
// every Go file of the project and checks them. Only direct imports count:
// even k8s.io/api leads to net/http somewhere.
package arch
