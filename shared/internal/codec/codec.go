// Package codec is how documents travel between the halves of Jetbridge: as
// base64 over gzip over JSON, read strictly and with bounded work, whoever
// wrote them. Text, because that is all that Flightctl carries unharmed: custom
// info is a string, and of an inline file that is declared as base64 version
// 1.2.0 escapes some characters like in a URL.
package codec

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
)

// Format is one kind of document, its limits, and its errors. Decode wraps
// exactly one of the errors, Encode only TooLarge.
type Format struct {
	// Name is the kind of document, for messages.
	Name string
	// Version is the only value of formatVersion that is read.
	Version int
	// MaxPacked and MaxPlain limit the size in bytes, as it travels and as JSON.
	MaxPacked, MaxPlain int

	TooLarge, Truncated, Corrupt, UnknownVersion, ForeignDevice error
}

// Encode packs a document.
func (f Format) Encode(doc any) ([]byte, error) {
	text, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("cannot encode %s: %w", f.Name, err)
	}
	var out bytes.Buffer
	// A writer without name and time gives the same bytes for the same text.
	w := gzip.NewWriter(&out)
	if _, err := w.Write(text); err != nil {
		return nil, fmt.Errorf("cannot compress %s: %w", f.Name, err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("cannot compress %s: %w", f.Name, err)
	}
	packed := base64.StdEncoding.AppendEncode(nil, out.Bytes())
	if len(packed) > f.MaxPacked || len(text) > f.MaxPlain {
		return nil, fmt.Errorf("%w: %d bytes encoded, %d plain; at most %d and %d fit", f.TooLarge, len(packed), len(text), f.MaxPacked, f.MaxPlain)
	}
	// What the other side would refuse shall not leave this one.
	if err := inspect(text, reflect.TypeOf(doc)); errors.Is(err, errTooMany) {
		return nil, fmt.Errorf("%w: %w", f.TooLarge, err)
	} else if err != nil {
		return nil, fmt.Errorf("cannot encode %s: %w", f.Name, err)
	}
	return packed, nil
}

// Decode unpacks the document of the named device into doc.
func (f Format) Decode(packed []byte, device string, doc any) error {
	if len(packed) > f.MaxPacked {
		return fmt.Errorf("%w: %d bytes, at most %d", f.TooLarge, len(packed), f.MaxPacked)
	}
	text, err := f.unpack(packed)
	if err != nil {
		return err
	}
	// Version and device come first: a newer document, or another device's,
	// shall be told so, however strange the rest of it looks.
	var head struct {
		FormatVersion int    `json:"formatVersion"`
		Device        string `json:"device"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return fmt.Errorf("%w: %w", f.Corrupt, err)
	}
	if head.FormatVersion != f.Version {
		return fmt.Errorf("%w: %d; this version of Jetbridge reads %d", f.UnknownVersion, head.FormatVersion, f.Version)
	}
	if head.Device != device {
		return fmt.Errorf("%w: it names %q, not %q", f.ForeignDevice, head.Device, device)
	}
	switch err := inspect(text, reflect.TypeOf(doc)); {
	case errors.Is(err, errTooMany):
		return fmt.Errorf("%w: %w", f.TooLarge, err)
	case err != nil:
		return fmt.Errorf("%w: %w", f.Corrupt, err)
	}
	if err := Strict(text, doc); err != nil {
		return fmt.Errorf("%w: %w", f.Corrupt, err)
	}
	return nil
}

func (f Format) unpack(packed []byte) ([]byte, error) {
	// Strict: else bits that mean nothing could change unseen.
	rest := len(packed) % 4
	zipped, err := base64.StdEncoding.Strict().AppendDecode(nil, packed[:len(packed)-rest])
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", f.Corrupt, err)
	case rest != 0:
		return nil, fmt.Errorf("%w after %d bytes", f.Truncated, len(packed))
	}
	r, err := gzip.NewReader(bytes.NewReader(zipped))
	if err == nil {
		var text []byte
		if text, err = io.ReadAll(io.LimitReader(r, int64(f.MaxPlain)+1)); err == nil {
			if len(text) > f.MaxPlain {
				return nil, fmt.Errorf("%w: more than %d bytes when decompressed", f.TooLarge, f.MaxPlain)
			}
			return text, nil
		}
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w after %d bytes", f.Truncated, len(packed))
	}
	return nil, fmt.Errorf("%w: cannot decompress: %w", f.Corrupt, err)
}

// Strict reads exactly one JSON value that has no field that into lacks.
func Strict(text []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the document")
	}
	return nil
}
