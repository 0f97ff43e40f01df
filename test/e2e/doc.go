// Package e2e tests Jetbridge on a lab: a real cluster, a real Flightctl and
// real devices. Everything is done as an operator would do it, with kubectl,
// flightctl, and systemctl, journalctl and podman on the device. test/e2e/run
// brings the lab up and runs it.
package e2e
