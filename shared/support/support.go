// Package support says which fields of a pod devices honour.
//
// One table has every field of v1.PodSpec. What the table refuses, and what it
// does not know, is an error that names the field: nothing is ever ignored in
// silence. Both halves of Jetbridge ask Check, and docs/reference/pods.md is
// generated from the same table.
package support

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/jetbridge/jetbridge/shared/internal/quantity"
)

// Class is what becomes of a field.
type Class string

const (
	// Supported fields have their meaning on the device, as on any node.
	Supported Class = "supported"
	// Cluster fields do their work in the control plane before a device sees
	// the pod, or have no meaning outside of the cluster's network.
	Cluster Class = "cluster only"
	// Refused fields make a pod fail with the reason UnsupportedField.
	Refused Class = "refused"
)

// rule is what the table says of one field.
type rule struct {
	class Class
	// values are, for a supported field, the only values (of a map: the only
	// keys) that are supported, none meaning all; for a refused field, those
	// that ask for nothing and are therefore accepted.
	values []string
	// note is for users: why a field is refused and what to do instead, or
	// what to know of a supported one.
	note string
}

// Check returns an error for each field of spec that is set to something that
// devices do not honour. Values that the API server fills in by itself are no
// errors. A nil spec has none.
func Check(spec *corev1.PodSpec) field.ErrorList {
	if spec == nil {
		return nil
	}
	return checkStruct(reflect.ValueOf(spec).Elem(), field.NewPath("spec"))
}

func checkStruct(v reflect.Value, path *field.Path) field.ErrorList {
	var errs field.ErrorList
	rules := table[v.Type()]
	for i := range v.NumField() {
		name, value := jsonName(v.Type().Field(i)), v.Field(i)
		switch r, known := rules[name]; {
		case unset(value):
		case name == "": // embedded: its fields are the parent's in JSON
			errs = append(errs, checkStruct(value, path)...)
		case !known:
			errs = append(errs, field.Forbidden(path.Child(name), "this version of Jetbridge does not know the field"))
		case r.class == Refused:
			if !slices.Contains(r.values, text(value)) {
				errs = append(errs, field.Forbidden(path.Child(name), r.note))
			}
		case r.class == Supported:
			errs = append(errs, checkValue(value, path.Child(name), r)...)
		}
	}
	return errs
}

// checkValue checks the value of a supported field, and what is in it.
func checkValue(v reflect.Value, path *field.Path, r rule) field.ErrorList {
	var errs field.ErrorList
	switch {
	case v.Kind() == reflect.Pointer:
		return checkValue(v.Elem(), path, r)
	case v.Kind() == reflect.Slice && isStruct(v.Type().Elem()):
		for i := range v.Len() {
			errs = append(errs, checkStruct(v.Index(i), path.Index(i))...)
		}
	case v.Kind() == reflect.Map && r.values != nil:
		for _, key := range keys(v) {
			if !slices.Contains(r.values, key) {
				errs = append(errs, field.Forbidden(path.Key(key), fmt.Sprintf("devices honour only %s here", strings.Join(r.values, ", "))))
			}
		}
		if list, ok := v.Interface().(corev1.ResourceList); ok {
			errs = append(errs, checkQuantities(list, path)...)
		}
	case isStruct(v.Type()):
		return checkStruct(v, path)
	case r.values != nil && !unset(v) && !slices.Contains(r.values, text(v)):
		errs = append(errs, field.NotSupported(path, text(v), r.values))
	}
	return errs
}

// checkQuantities refuses amounts that no computer can count with.
func checkQuantities(list corev1.ResourceList, path *field.Path) field.ErrorList {
	var errs field.ErrorList
	for _, name := range slices.Sorted(maps.Keys(list)) {
		q := list[name]
		if err := quantity.Check(q.String()); err != nil {
			errs = append(errs, field.Invalid(path.Key(string(name)), q.String(), err.Error()))
		}
	}
	return errs
}

// Field is one row of the table.
type Field struct {
	// Path is the field's place in a pod, with [] for each list.
	Path  string
	Class Class
	// Values are the only supported ones, or the accepted ones of a refused
	// field; none means all, or none.
	Values []string
	// Note is a remark for users, or empty.
	Note string
}

// Fields lists the whole table in the order of v1.PodSpec. What initContainers
// share with containers, and what is inside of refused fields, is not repeated.
func Fields() []Field {
	return fieldsOf(reflect.TypeFor[corev1.PodSpec](), "spec")
}

func fieldsOf(t reflect.Type, path string) []Field {
	var rows []Field
	for i := range t.NumField() {
		f := t.Field(i)
		name := jsonName(f)
		if name == "" {
			rows = append(rows, fieldsOf(f.Type, path)...)
			continue
		}
		r := table[t][name]
		row := Field{Path: path + "." + name, Class: r.class, Values: r.values, Note: r.note}
		inner := f.Type
		for inner.Kind() == reflect.Pointer || inner.Kind() == reflect.Slice {
			if inner.Kind() == reflect.Slice {
				row.Path += "[]"
			}
			inner = inner.Elem()
		}
		rows = append(rows, row)
		if r.class == Supported && isStruct(inner) && row.Path != "spec.initContainers[]" {
			rows = append(rows, fieldsOf(inner, row.Path)...)
		}
	}
	return rows
}

// Markdown renders the table for the reference documentation.
func Markdown() string {
	var b strings.Builder
	b.WriteString(`# Pod fields

<!-- Generated from shared/support; run: go test ./shared/support -update -->

A pod that sets a refused field is not run: its phase becomes Failed with the
reason UnsupportedField and a message that names the field. Fields that are
"cluster only" do their work in the control plane before a device sees the pod,
or have no meaning outside of the cluster's network.

| Field | On devices | Notes |
|---|---|---|
`)
	for _, f := range Fields() {
		notes := []string{f.Note}
		if len(f.Values) > 0 {
			kind := "only"
			if f.Class == Refused {
				kind = "accepted:"
			}
			notes = append(notes, kind+" `"+strings.Join(f.Values, "`, `")+"`")
		}
		note := strings.TrimPrefix(strings.Join(notes, "; "), "; ")
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.Path, f.Class, note)
	}
	return b.String()
}

// jsonName is the field's name in JSON; empty if it is embedded.
func jsonName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

// isStruct says whether values of t have fields of their own in JSON.
func isStruct(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t != reflect.TypeFor[resource.Quantity]()
}

// unset says whether a field's value asks for nothing: an empty list is the
// same as none in the API, but a pointer to false is not.
func unset(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Slice, reflect.Map:
		return v.Len() == 0
	default:
		return v.IsZero()
	}
}

// text is how a scalar value looks in a manifest.
func text(v reflect.Value) string {
	if v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if v.Kind() == reflect.Struct && v.NumField() == 1 { // spec.os
		v = v.Field(0)
	}
	return fmt.Sprint(v.Interface())
}

// keys are the sorted keys of a map of strings.
func keys(v reflect.Value) []string {
	var names []string
	for _, k := range v.MapKeys() {
		names = append(names, k.String())
	}
	slices.Sort(names)
	return names
}
