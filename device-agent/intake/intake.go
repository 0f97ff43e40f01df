// Package intake takes in bundles: it reads them from where Flightctl puts
// them, verifies them, opens their secrets, and keeps the last good one.
//
// The highest generation wins. A bundle that is damaged, foreign or older
// changes nothing.
package intake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/jetbridge/jetbridge/device-agent/journal"
	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/seal"
)

// State is a bundle that was taken in, with its secrets opened.
type State struct {
	Bundle  *bundle.Bundle
	Secrets bundle.Secrets
}

// Intake belongs to one goroutine.
type Intake struct {
	device string
	key    seal.PrivateKey
	source string
	good   string
	state  *State
}

// New prepares an intake; goodDir is where the last good bundle is kept.
func New(device string, key seal.PrivateKey, source, goodDir string) *Intake {
	return &Intake{device: device, key: key, source: source, good: filepath.Join(goodDir, "good")}
}

// LoadKey reads the device's sealing key, or makes it at the first start.
func LoadKey(dir string) (seal.PrivateKey, error) {
	path := filepath.Join(dir, "key")
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := seal.NewPrivateKey()
		if err != nil {
			return seal.PrivateKey{}, err
		}
		return key, journal.WriteFile(path, key.Bytes(), 0o600)
	}
	if err != nil {
		return seal.PrivateKey{}, fmt.Errorf("cannot read the sealing key: %w", err)
	}
	return seal.ParsePrivateKey(raw)
}

// Restore returns the last good bundle, nil if there was none.
func (i *Intake) Restore() (*State, error) {
	data, err := readLimited(i.good)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the last good bundle: %w", err)
	}
	s, err := i.open(data)
	if err != nil {
		return nil, fmt.Errorf("cannot use the last good bundle: %w", err)
	}
	i.state = s
	return s, nil
}

// Read takes in what Flightctl has put there. changed says that the state is
// a new one; without a file there is nothing to do. The error concerns a
// bundle that was not taken in.
func (i *Intake) Read() (state *State, changed bool, err error) {
	data, err := readLimited(i.source)
	if errors.Is(err, fs.ErrNotExist) {
		return i.state, false, nil
	}
	if err != nil {
		return i.state, false, fmt.Errorf("cannot read the bundle: %w", err)
	}
	b, err := bundle.Decode(data, i.device)
	if err != nil {
		return i.state, false, err
	}
	if b.Generation == 0 || i.state != nil && b.Generation <= i.state.Bundle.Generation {
		return i.state, false, nil
	}
	secrets, err := b.OpenSecrets(i.key)
	if err != nil {
		return i.state, false, err
	}
	if err := journal.WriteFile(i.good, data, 0o600); err != nil {
		return i.state, false, err
	}
	i.state = &State{Bundle: b, Secrets: secrets}
	return i.state, true, nil
}

func (i *Intake) open(data []byte) (*State, error) {
	b, err := bundle.Decode(data, i.device)
	if err != nil {
		return nil, err
	}
	secrets, err := b.OpenSecrets(i.key)
	if err != nil {
		return nil, err
	}
	return &State{Bundle: b, Secrets: secrets}, nil
}

// readLimited reads a file, and of one that is too large only so much that
// the decoder can say so.
func readLimited(path string) (data []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return io.ReadAll(io.LimitReader(f, bundle.MaxEncodedSize+1))
}

// Watch calls poke whenever something changes in the bundle's folder, and at
// least every interval, until ctx ends. The folder is made if it is missing.
func Watch(ctx context.Context, path string, interval time.Duration, poke func()) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the bundle's folder: %w", err)
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("cannot watch the bundle's folder: %w", err)
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	watch := func() error {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		return w.Add(dir)
	}
	if err := watch(); err != nil {
		return fmt.Errorf("cannot watch the bundle's folder: %w", err)
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			// The folder may have been replaced: watching it again is no change.
			if err := watch(); err != nil {
				return fmt.Errorf("cannot watch the bundle's folder: %w", err)
			}
		case <-w.Events:
		case err := <-w.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("cannot watch the bundle's folder: %w", err)
			}
		}
		poke()
	}
}
