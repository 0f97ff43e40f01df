package codec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/jetbridge/jetbridge/shared/internal/quantity"
)

// What a text may ask a decoder to build. In "[{},{},…]" an element costs three
// bytes, but a thousand and more as a struct of the Kubernetes API, so the size
// of the text alone is no limit.
const (
	maxDepth    = 64
	maxElements = 1 << 16 // of all lists together
	maxMembers  = 1 << 19 // of all objects together
)

var errTooMany = errors.New("too many values")

// inspect walks through a JSON text, without building anything, beside the type
// that it is to be decoded into. It refuses what would be costly to build, and
// quantities that are costly to parse.
func inspect(text []byte, t reflect.Type) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	in := inspector{decoder: d, fields: map[reflect.Type]map[string]reflect.Type{}}
	return in.value(t, 0)
}

type inspector struct {
	decoder           *json.Decoder
	elements, members int
	fields            map[reflect.Type]map[string]reflect.Type
}

// value walks through the next value; t is nil where its type is of no concern.
func (in *inspector) value(t reflect.Type, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("nested more than %d levels deep", maxDepth)
	}
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	token, err := in.decoder.Token()
	if err != nil {
		return err
	}
	switch token := token.(type) {
	case json.Delim:
		for in.decoder.More() {
			inner, err := in.inner(t, token)
			if err != nil {
				return err
			}
			if err := in.value(inner, depth+1); err != nil {
				return err
			}
		}
		_, err = in.decoder.Token()
		return err
	case string:
		return checkScalar(t, token)
	case json.Number:
		return checkScalar(t, token.String())
	}
	return nil
}

// inner counts the next element of a list or the next member of an object, of
// which it reads the key, and gives its type.
func (in *inspector) inner(t reflect.Type, open json.Delim) (reflect.Type, error) {
	if open == '[' {
		if in.elements++; in.elements > maxElements {
			return nil, fmt.Errorf("%w: more than %d in lists", errTooMany, maxElements)
		}
		if t != nil && t.Kind() == reflect.Slice {
			return t.Elem(), nil
		}
		return nil, nil
	}
	if in.members++; in.members > maxMembers {
		return nil, fmt.Errorf("%w: more than %d in objects", errTooMany, maxMembers)
	}
	key, err := in.decoder.Token()
	if err != nil {
		return nil, err
	}
	name, ok := key.(string)
	switch {
	case !ok || t == nil:
		return nil, nil
	case t.Kind() == reflect.Map:
		return t.Elem(), nil
	case t.Kind() != reflect.Struct || reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()):
		return nil, nil
	}
	// Package json takes "Limits" for "limits"; here only one spelling is
	// known, so that no other slips through.
	inner, ok := in.fieldsOf(t)[name]
	if !ok {
		return nil, fmt.Errorf("unknown field %q", name)
	}
	return inner, nil
}

// fieldsOf gives the types of a struct's fields by their names in JSON.
func (in *inspector) fieldsOf(t reflect.Type) map[string]reflect.Type {
	if known, ok := in.fields[t]; ok {
		return known
	}
	fields := map[string]reflect.Type{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			for inner, of := range in.fieldsOf(f.Type) {
				fields[inner] = of
			}
		case name == "" && f.IsExported():
			fields[f.Name] = f.Type
		case name != "-" && f.IsExported():
			fields[name] = f.Type
		}
	}
	in.fields[t] = fields
	return fields
}

func checkScalar(t reflect.Type, text string) error {
	if t == reflect.TypeFor[resource.Quantity]() {
		return quantity.Check(strings.TrimSpace(text))
	}
	return nil
}
