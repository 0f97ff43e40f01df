package flightapi

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Device is the part of a device that the shim needs.
type Device struct {
	Name   string
	Labels map[string]string
	// Fleet is the fleet that owns it; empty for none.
	Fleet string
	// Summary is Flightctl's status, such as Online or Unknown.
	Summary string
	// CustomInfo is what the device's custom-info scripts printed.
	CustomInfo map[string]string
}

type deviceJSON struct {
	Metadata struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels"`
		Owner  string            `json:"owner"`
	} `json:"metadata"`
	Status struct {
		Summary struct {
			Status string `json:"status"`
		} `json:"summary"`
		SystemInfo struct {
			CustomInfo map[string]string `json:"customInfo"`
		} `json:"systemInfo"`
	} `json:"status"`
}

func (d deviceJSON) device() Device {
	fleet, _ := strings.CutPrefix(d.Metadata.Owner, "Fleet/")
	return Device{
		Name: d.Metadata.Name, Labels: d.Metadata.Labels, Fleet: fleet,
		Summary: d.Status.Summary.Status, CustomInfo: d.Status.SystemInfo.CustomInfo,
	}
}

// Devices lists all devices that match a label selector, page by page.
func (c *Client) Devices(ctx context.Context, selector string) ([]Device, error) {
	var out []Device
	query := url.Values{"limit": {strconv.Itoa(pageSize)}}
	if selector != "" {
		query.Set("labelSelector", selector)
	}
	for {
		a, err := c.do(ctx, http.MethodGet, "/devices", query, nil)
		if err != nil {
			return nil, err
		}
		var page struct {
			Items    []deviceJSON `json:"items"`
			Metadata struct {
				Continue string `json:"continue"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(a.body, &page); err != nil {
			return nil, fmt.Errorf("cannot read list of devices: %w", err)
		}
		for _, d := range page.Items {
			out = append(out, d.device())
		}
		if page.Metadata.Continue == "" {
			return out, nil
		}
		query.Set("continue", page.Metadata.Continue)
	}
}

// Device reads one device; ErrNotFound if there is none.
func (c *Client) Device(ctx context.Context, name string) (Device, error) {
	a, err := c.do(ctx, http.MethodGet, "/devices/"+url.PathEscape(name), nil, nil)
	if err != nil {
		return Device{}, err
	}
	var d deviceJSON
	if err := json.Unmarshal(a.body, &d); err != nil {
		return Device{}, fmt.Errorf("cannot read device %s: %w", name, err)
	}
	return d.device(), nil
}

// LastSeen says how long ago, by Flightctl's clock, the device was in contact;
// false if it never was.
func (c *Client) LastSeen(ctx context.Context, name string) (time.Duration, bool, error) {
	a, err := c.do(ctx, http.MethodGet, "/devices/"+url.PathEscape(name)+"/lastseen", nil, nil)
	if err != nil {
		return 0, false, err
	}
	if a.code == http.StatusNoContent || len(bytes.TrimSpace(a.body)) == 0 {
		return 0, false, nil
	}
	var seen struct {
		LastSeen time.Time `json:"lastSeen"`
	}
	if err := json.Unmarshal(a.body, &seen); err != nil {
		return 0, false, fmt.Errorf("cannot read when device %s was seen: %w", name, err)
	}
	if seen.LastSeen.IsZero() {
		return 0, false, nil
	}
	return max(0, a.date.Sub(seen.LastSeen)), true, nil
}

// File is a file on a device.
type File struct {
	Path string
	// Content is text. Flightctl 1.2.0 cannot carry anything else: of content
	// that is declared as base64 it escapes each / and = like in a URL, and
	// the device then fails to decode it.
	Content string
	// Mode is the permission bits.
	Mode int
}

// SetDeviceFile makes the entry of this name in a standalone device's
// configuration hold exactly this file, and leaves other entries alone.
// It says whether anything had to be changed.
func (c *Client) SetDeviceFile(ctx context.Context, device, entry string, f File) (bool, error) {
	want := map[string]any{
		"name": entry,
		"inline": []any{map[string]any{
			"path": f.Path, "content": f.Content, "contentEncoding": "plain",
			"mode": json.Number(strconv.Itoa(f.Mode)), "user": "root",
		}},
	}
	return c.edit(ctx, "/devices/"+url.PathEscape(device), func(doc map[string]any) bool {
		return setEntry(object(doc, "spec"), entry, want)
	})
}

// SetDeviceLabel gives a device's label this value, and says whether it had
// another one.
func (c *Client) SetDeviceLabel(ctx context.Context, device, key, value string) (bool, error) {
	return c.edit(ctx, "/devices/"+url.PathEscape(device), func(doc map[string]any) bool {
		labels := object(object(doc, "metadata"), "labels")
		if labels[key] == value {
			return false
		}
		labels[key] = value
		return true
	})
}

// HTTPRef is a file that Flightctl fetches from a Repository.
type HTTPRef struct {
	Repository, Suffix, FilePath string
}

func (r HTTPRef) entry(name string) map[string]any {
	return map[string]any{"name": name, "httpRef": map[string]any{
		"repository": r.Repository, "suffix": r.Suffix, "filePath": r.FilePath,
	}}
}

// HasFleetRef says whether the fleet's template has this entry.
func (c *Client) HasFleetRef(ctx context.Context, fleet, entry string, ref HTTPRef) (bool, error) {
	doc, err := c.read(ctx, "/fleets/"+url.PathEscape(fleet))
	if err != nil {
		return false, err
	}
	return !setEntry(templateSpec(doc), entry, ref.entry(entry)), nil
}

// SetFleetRef adds this entry to the fleet's template or mends it, and says
// whether it had to; ErrOwned if something else manages the fleet.
func (c *Client) SetFleetRef(ctx context.Context, fleet, entry string, ref HTTPRef) (bool, error) {
	return c.edit(ctx, "/fleets/"+url.PathEscape(fleet), func(doc map[string]any) bool {
		return setEntry(templateSpec(doc), entry, ref.entry(entry))
	})
}

func templateSpec(doc map[string]any) map[string]any {
	return object(object(object(doc, "spec"), "template"), "spec")
}

// Repository is an HTTP repository.
type Repository struct {
	Name, URL, Username, Password string
	// CA is the PEM of the authority of the server's certificate.
	CA []byte
	// ValidationSuffix is the path by which Flightctl tests the repository.
	ValidationSuffix string
}

// PutRepository makes or replaces a repository.
func (c *Client) PutRepository(ctx context.Context, r Repository) error {
	_, err := c.do(ctx, http.MethodPut, "/repositories/"+url.PathEscape(r.Name), nil, map[string]any{
		"apiVersion": "flightctl.io/v1beta1", "kind": "Repository",
		"metadata": map[string]any{"name": r.Name},
		"spec": map[string]any{
			"type": "http", "url": r.URL, "validationSuffix": r.ValidationSuffix,
			"httpConfig": map[string]any{
				"username": r.Username, "password": r.Password, "ca.crt": base64.StdEncoding.EncodeToString(r.CA),
			},
		},
	})
	return err
}

func (c *Client) read(ctx context.Context, path string) (map[string]any, error) {
	a, err := c.do(ctx, http.MethodGet, path, nil, nil)
	if err != nil {
		return nil, err
	}
	var doc map[string]any
	dec := json.NewDecoder(bytes.NewReader(a.body))
	dec.UseNumber() // numbers go back as they came
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	return doc, nil
}

// edit reads, changes and writes back, guarded by the resource version. It
// tries again a few times when somebody else was faster.
func (c *Client) edit(ctx context.Context, path string, change func(map[string]any) bool) (bool, error) {
	const tries = 4
	for n := 1; ; n++ {
		doc, err := c.read(ctx, path)
		if err != nil {
			return false, err
		}
		if !change(doc) {
			return false, nil
		}
		delete(doc, "status")
		_, err = c.do(ctx, http.MethodPut, path, nil, doc)
		if err == nil {
			return true, nil
		}
		if n == tries || !errors.Is(err, ErrConflict) {
			return false, err
		}
	}
}

// object returns the object at key, and makes it if there is none.
func object(parent map[string]any, key string) map[string]any {
	if child, ok := parent[key].(map[string]any); ok {
		return child
	}
	child := map[string]any{}
	parent[key] = child
	return child
}

// setEntry makes the entry of this name in spec.config equal to want, and says
// whether it had to. What the server filled in beside it is no difference.
func setEntry(spec map[string]any, name string, want map[string]any) bool {
	list, _ := spec["config"].([]any)
	for i, item := range list {
		entry, ok := item.(map[string]any)
		if !ok || entry["name"] != name {
			continue
		}
		if contains(entry, want) {
			return false
		}
		list[i] = want
		return true
	}
	spec["config"] = append(list, want)
	return true
}

// contains says whether have holds all that want does.
func contains(have, want any) bool {
	switch w := want.(type) {
	case map[string]any:
		h, ok := have.(map[string]any)
		if !ok {
			return false
		}
		for k, v := range w {
			if !contains(h[k], v) {
				return false
			}
		}
		return true
	case []any:
		h, ok := have.([]any)
		if !ok || len(h) != len(w) {
			return false
		}
		for i := range w {
			if !contains(h[i], w[i]) {
				return false
			}
		}
		return true
	}
	return reflect.DeepEqual(have, want)
}
