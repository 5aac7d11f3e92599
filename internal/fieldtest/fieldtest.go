// Package fieldtest finds fields that a conversion forgets: a value of which
// every field is set is converted there and back, and must come back whole.
//
// It is for tests. It imports no other package of the project.
package fieldtest

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

// Fill returns a T of which every field, also within fields, is neither zero
// nor like another. It fails the test on a type that it does not know.
func Fill[T any](t testing.TB) T {
	t.Helper()
	var v T
	(&filler{t: t}).fill(reflect.ValueOf(&v).Elem(), reflect.TypeFor[T]().Name())
	return v
}

type filler struct {
	t testing.TB
	n int
}

func (f *filler) fill(v reflect.Value, path string) {
	f.t.Helper()
	f.n++
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Date(2026, 1, 2, 3, 4, f.n, 0, time.UTC)))
		return
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{192, 0, 2, byte(f.n)})))
		return
	case time.Duration:
		v.SetInt(int64(time.Duration(f.n) * time.Second))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprintf("v%d", f.n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(int64(f.n))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(f.n))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			f.fill(v.Index(i), fmt.Sprintf("%s[%d]", path, i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		f.fill(key, path)
		f.fill(value, path)
		v.SetMapIndex(key, value)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		f.fill(v.Elem(), path)
	case reflect.Struct:
		for i := range v.NumField() {
			f.fill(v.Field(i), path+"."+v.Type().Field(i).Name)
		}
	default:
		f.t.Fatalf("%s: fieldtest cannot fill a %s", path, v.Type())
	}
}

// Matters fails the test for each field of T, also within fields, that may
// change without a change of what convert makes of the T: convert forgets it.
// Fields named in skip, such as "Capsule.HostID", are left out on purpose.
func Matters[T any](t testing.TB, convert func(T) any, skip ...string) {
	t.Helper()
	whole := convert(Fill[T](t))
	for _, path := range leaves(reflect.TypeFor[T](), nil) {
		v := Fill[T](t)
		field, name := reflect.ValueOf(&v).Elem(), reflect.TypeFor[T]().Name()
		for _, i := range path {
			if field.Kind() == reflect.Pointer {
				field = field.Elem()
			}
			name += "." + field.Type().Field(i).Name
			field = field.Field(i)
		}
		field.SetZero()
		if !slices.Contains(skip, name) && reflect.DeepEqual(whole, convert(v)) {
			t.Errorf("%s is forgotten", name)
		}
	}
}

// leaves returns the paths, as indexes of fields, to everything in t that is no
// struct of ours.
func leaves(t reflect.Type, path []int) [][]int {
	inner := t
	if inner.Kind() == reflect.Pointer {
		inner = inner.Elem()
	}
	if inner.Kind() != reflect.Struct || inner == reflect.TypeFor[time.Time]() || inner == reflect.TypeFor[netip.Addr]() {
		return [][]int{path}
	}
	var all [][]int
	for i := range inner.NumField() {
		all = append(all, leaves(inner.Field(i).Type, append(slices.Clone(path), i))...)
	}
	return all
}
