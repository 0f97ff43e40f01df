// Command mint makes a bundle by hand, from YAML documents of Pods,
// ConfigMaps and Secrets, to try the agent without a cluster:
//
//	mint -device NAME -generation 3 -key /var/lib/jetbridge/key pods.yaml >desired
//
// A Pod without a UID gets its name as UID. All ConfigMaps and Secrets go to
// all Pods of their namespace.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/jetbridge/jetbridge/shared/bundle"
	"github.com/jetbridge/jetbridge/shared/seal"
)

func main() {
	device := flag.String("device", "", "the device's name")
	generation := flag.Int64("generation", 1, "the bundle's generation")
	keyFile := flag.String("key", "", "the device's private sealing key; needed if there are Secrets")
	del := flag.String("delete", "", "name of a pod that shall stop")
	grace := flag.Int64("grace", 30, "its grace period in seconds")
	flag.Parse()
	if err := mint(os.Stdout, *device, *generation, *keyFile, *del, *grace, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "mint:", err)
		os.Exit(1)
	}
}

func mint(out io.Writer, device string, generation int64, keyFile, del string, grace int64, files []string) error {
	d := bundle.Desired{Device: device, Secrets: bundle.Secrets{}}
	var configMaps []corev1.ConfigMap
	var secrets []corev1.Secret
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		docs := k8syaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
		for {
			doc, err := docs.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			var kind metav1.TypeMeta
			if err := yaml.Unmarshal(doc, &kind); err != nil {
				return err
			}
			switch kind.Kind {
			case "Pod":
				var p corev1.Pod
				if err := yaml.UnmarshalStrict(doc, &p); err != nil {
					return err
				}
				if p.Namespace == "" {
					p.Namespace = "default"
				}
				if p.UID == "" {
					p.UID = types.UID(p.Name)
				}
				if p.Spec.RestartPolicy == "" {
					p.Spec.RestartPolicy = corev1.RestartPolicyAlways
				}
				if p.Name == del {
					now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
					p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, &grace
				}
				d.Pods = append(d.Pods, bundle.Pod{Metadata: p.ObjectMeta, Spec: p.Spec})
			case "ConfigMap":
				var c corev1.ConfigMap
				if err := yaml.UnmarshalStrict(doc, &c); err != nil {
					return err
				}
				configMaps = append(configMaps, c)
			case "Secret":
				var s corev1.Secret
				if err := yaml.UnmarshalStrict(doc, &s); err != nil {
					return err
				}
				secrets = append(secrets, s)
			default:
				return fmt.Errorf("%s: kind %q is not known", file, kind.Kind)
			}
		}
	}
	for i := range d.Pods {
		p := &d.Pods[i]
		for _, c := range configMaps {
			data := map[string][]byte{}
			for k, v := range c.Data {
				data[k] = []byte(v)
			}
			for k, v := range c.BinaryData {
				data[k] = v
			}
			p.ConfigMaps = append(p.ConfigMaps, bundle.ConfigMap{Name: c.Name, Data: data})
		}
		for _, s := range secrets {
			data := map[string][]byte{}
			for k, v := range s.Data {
				data[k] = v
			}
			for k, v := range s.StringData {
				data[k] = []byte(v)
			}
			ps := d.Secrets[p.Metadata.UID]
			ps.Secrets = append(ps.Secrets, bundle.Secret{Name: s.Name, Type: s.Type, Data: data})
			d.Secrets[p.Metadata.UID] = ps
		}
	}
	var public *seal.PublicKey
	if d.HasSecrets() {
		raw, err := os.ReadFile(keyFile)
		if err != nil {
			return err
		}
		key, err := seal.ParsePrivateKey(raw)
		if err != nil {
			return err
		}
		pub, err := key.Public()
		if err != nil {
			return err
		}
		public = &pub
	}
	b, err := d.Mint(generation, public)
	if err != nil {
		return err
	}
	data, err := b.Encode()
	if err != nil {
		return err
	}
	_, err = out.Write(data)
	return err
}
