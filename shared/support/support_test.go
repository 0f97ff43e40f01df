package support_test

import (
	"encoding/json"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/jetbridge/jetbridge/shared/support"
)

var update = flag.Bool("update", false, "rewrite generated files")

const reference = "../../docs/reference/pods.md"

func spec(t *testing.T, text string) *corev1.PodSpec {
	t.Helper()
	var s corev1.PodSpec
	require.NoError(t, yaml.UnmarshalStrict([]byte(text), &s))
	return &s
}

// TestCheck_accepts has manifests as the API server hands them out, with all
// that it fills in.
func TestCheck_accepts(t *testing.T) {
	for name, text := range map[string]string{
		"nothing": `{}`,
		"defaulted pod": `
containers:
- name: app
  image: registry.example/app:1
  imagePullPolicy: IfNotPresent
  command: [/app]
  args: [--port, "8080"]
  workingDir: /srv
  ports: [{name: http, containerPort: 8080, hostPort: 80, hostIP: 10.0.0.1, protocol: TCP}]
  env:
  - {name: A, value: "1"}
  - {name: B, valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.name}}}
  - {name: C, valueFrom: {resourceFieldRef: {containerName: app, resource: limits.cpu, divisor: "0"}}}
  - {name: D, valueFrom: {configMapKeyRef: {name: c, key: k, optional: true}}}
  - {name: E, valueFrom: {secretKeyRef: {name: s, key: k, optional: false}}}
  envFrom: [{prefix: P_, configMapRef: {name: c, optional: true}}, {secretRef: {name: s}}]
  resources:
    requests: {cpu: 10m, memory: 8Mi, ephemeral-storage: 1Gi}
    limits: {cpu: 100m, memory: 64Mi}
  resizePolicy: [{resourceName: cpu, restartPolicy: NotRequired}]
  terminationMessagePath: /dev/termination-log
  terminationMessagePolicy: File
  securityContext:
    runAsUser: 1000
    runAsGroup: 1000
    runAsNonRoot: false
    privileged: false
    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    procMount: Default
    capabilities: {add: [NET_ADMIN], drop: [ALL]}
  volumeMounts:
  - {name: data, mountPath: /data, readOnly: true, recursiveReadOnly: Disabled, mountPropagation: None}
  - {name: kube-api-access-x, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
initContainers:
- {name: init, image: busybox, resources: {}, terminationMessagePath: /dev/termination-log, terminationMessagePolicy: File}
dnsPolicy: ClusterFirst
enableServiceLinks: true
restartPolicy: Always
schedulerName: default-scheduler
securityContext: {}
serviceAccount: default
serviceAccountName: default
automountServiceAccountToken: true
terminationGracePeriodSeconds: 30
nodeName: device-1
nodeSelector: {jetbridge.dev/fleet: shop}
affinity: {nodeAffinity: {}}
priority: 0
preemptionPolicy: PreemptLowerPriority
tolerations: [{effect: NoExecute, key: node.kubernetes.io/not-ready, operator: Exists, tolerationSeconds: 300}]
topologySpreadConstraints: [{maxSkew: 1, topologyKey: jetbridge.dev/device, whenUnsatisfiable: DoNotSchedule}]
hostname: app
subdomain: apps
imagePullSecrets: [{name: pull}]
volumes:
- {name: data, emptyDir: {}}
- {name: c, configMap: {name: c, defaultMode: 420, optional: true, items: [{key: a, path: b, mode: 256}]}}
- {name: s, secret: {secretName: s, defaultMode: 420}}
- {name: d, downwardAPI: {defaultMode: 420, items: [{path: labels, fieldRef: {apiVersion: v1, fieldPath: metadata.labels}}]}}
- {name: h, hostPath: {path: /srv, type: ""}}
- {name: i, hostPath: {path: /dev/x, type: CharDevice}}
- name: kube-api-access-x
  projected:
    defaultMode: 420
    sources:
    - serviceAccountToken: {expirationSeconds: 3607, path: token}
    - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
    - downwardAPI: {items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]}
    - secret: {name: s, optional: true}
`,
		"what asks for nothing": `
hostNetwork: false
hostPID: false
hostUsers: true
shareProcessNamespace: false
setHostnameAsFQDN: false
os: {name: linux}
hostAliases: []
ephemeralContainers: []
securityContext: {runAsNonRoot: false, supplementalGroups: [], sysctls: [], supplementalGroupsPolicy: Merge}
containers: [{name: a, stdin: false, tty: false, volumeDevices: [], volumeMounts: [{name: v, mountPath: /v, subPath: ""}]}]
`,
	} {
		t.Run(name, func(t *testing.T) {
			assert.Empty(t, support.Check(spec(t, text)))
		})
	}
	assert.Empty(t, support.Check(nil))
}

// TestCheck_refuses sets one refused thing at a time.
func TestCheck_refuses(t *testing.T) {
	for want, text := range map[string]string{
		"spec.hostNetwork: Forbidden: host namespaces":                                        `hostNetwork: true`,
		"spec.hostPID: Forbidden:":                                                            `hostPID: true`,
		"spec.hostIPC: Forbidden:":                                                            `hostIPC: true`,
		"spec.hostUsers: Forbidden:":                                                          `hostUsers: false`,
		"spec.shareProcessNamespace: Forbidden:":                                              `shareProcessNamespace: true`,
		"spec.os: Forbidden: devices run Linux":                                               `os: {name: windows}`,
		"spec.activeDeadlineSeconds: Forbidden:":                                              `activeDeadlineSeconds: 10`,
		`spec.dnsPolicy: Unsupported value: "None"`:                                           `dnsPolicy: None`,
		"spec.dnsConfig: Forbidden:":                                                          `dnsConfig: {}`,
		"spec.hostAliases: Forbidden:":                                                        `hostAliases: [{ip: 10.0.0.1}]`,
		"spec.runtimeClassName: Forbidden:":                                                   `runtimeClassName: kata`,
		"spec.ephemeralContainers: Forbidden:":                                                `ephemeralContainers: [{name: e}]`,
		"spec.readinessGates: Forbidden:":                                                     `readinessGates: [{conditionType: x}]`,
		"spec.resourceClaims: Forbidden:":                                                     `resourceClaims: [{name: x}]`,
		"spec.resources: Forbidden:":                                                          `resources: {limits: {cpu: 1}}`,
		"spec.securityContext.fsGroup: Forbidden:":                                            `securityContext: {fsGroup: 0}`,
		"spec.securityContext.runAsNonRoot: Forbidden:":                                       `securityContext: {runAsNonRoot: true}`,
		"spec.securityContext.seccompProfile: Forbidden:":                                     `securityContext: {seccompProfile: {type: RuntimeDefault}}`,
		"spec.securityContext.supplementalGroupsPolicy: Forbidden:":                           `securityContext: {supplementalGroupsPolicy: Strict}`,
		"spec.containers[0].livenessProbe: Forbidden: probes are not supported":               `containers: [{livenessProbe: {}}]`,
		"spec.containers[1].startupProbe: Forbidden:":                                         `containers: [{}, {startupProbe: {tcpSocket: {port: 1}}}]`,
		"spec.initContainers[0].restartPolicy: Forbidden: restart policies of single":         `initContainers: [{restartPolicy: Always}]`,
		"spec.initContainers[0].lifecycle: Forbidden:":                                        `initContainers: [{lifecycle: {}}]`,
		"spec.containers[0].stdin: Forbidden:":                                                `containers: [{stdin: true}]`,
		`spec.containers[0].terminationMessagePolicy: Unsupported value: "FallbackToLogs`:     `containers: [{terminationMessagePolicy: FallbackToLogsOnError}]`,
		"spec.containers[0].volumeMounts[0].subPath: Forbidden:":                              `containers: [{volumeMounts: [{subPath: a}]}]`,
		"spec.containers[0].volumeMounts[0].mountPropagation: Forbidden:":                     `containers: [{volumeMounts: [{mountPropagation: Bidirectional}]}]`,
		"spec.containers[0].resources.limits[nvidia.com/gpu]: Forbidden: devices honour only": `containers: [{resources: {limits: {nvidia.com/gpu: 1}}}]`,
		"spec.containers[0].resources.limits[ephemeral-storage]: Forbidden:":                  `containers: [{resources: {limits: {ephemeral-storage: 1}}}]`,
		"spec.containers[0].resources.requests[memory]: Invalid value: \"1e999\": quantity":   `containers: [{resources: {requests: {memory: "1e999"}}}]`,
		"spec.containers[0].env[1].valueFrom.fileKeyRef: Forbidden:":                          `containers: [{env: [{name: a}, {name: b, valueFrom: {fileKeyRef: {key: a}}}]}]`,
		"spec.containers[0].securityContext.seLinuxOptions: Forbidden:":                       `containers: [{securityContext: {seLinuxOptions: {}}}]`,
		"spec.containers[0].securityContext.procMount: Forbidden:":                            `containers: [{securityContext: {procMount: Unmasked}}]`,
		"spec.volumes[0].emptyDir.medium: Forbidden:":                                         `volumes: [{name: a, emptyDir: {medium: Memory}}]`,
		"spec.volumes[0].emptyDir.sizeLimit: Forbidden:":                                      `volumes: [{name: a, emptyDir: {sizeLimit: 1Gi}}]`,
		"spec.volumes[0].persistentVolumeClaim: Forbidden:":                                   `volumes: [{name: a, persistentVolumeClaim: {claimName: a}}]`,
		"spec.volumes[0].gitRepo: Forbidden: gitRepo volumes are a security risk":             `volumes: [{name: a, gitRepo: {repository: a}}]`,
		"spec.volumes[0].secret.items[0].user: Forbidden:":                                    `volumes: [{name: a, secret: {items: [{user: 0}]}}]`,
		"spec.volumes[0].projected.sources[0].clusterTrustBundle: Forbidden:":                 `volumes: [{name: a, projected: {sources: [{clusterTrustBundle: {path: a}}]}}]`,
		`spec.volumes[0].hostPath.type: Unsupported value: "Weird"`:                           `volumes: [{name: a, hostPath: {type: Weird}}]`,
	} {
		t.Run(want, func(t *testing.T) {
			errs := support.Check(spec(t, text))
			require.Len(t, errs, 1, "%v", errs)
			assert.Contains(t, errs[0].Error(), want)
		})
	}
}

func TestCheck_reportsAllInOrder(t *testing.T) {
	errs := support.Check(spec(t, `{hostPID: true, containers: [{tty: true, resources: {limits: {b: 1, a: 1}}}], volumes: [{nfs: {}}]}`))
	var paths []string
	for _, err := range errs {
		paths = append(paths, err.Field)
	}
	assert.Equal(t, []string{
		"spec.volumes[0].nfs",
		"spec.containers[0].resources.limits[a]",
		"spec.containers[0].resources.limits[b]",
		"spec.containers[0].tty",
		"spec.hostPID",
	}, paths)
}

// TestFields_complete fails when the API grows a field that the table lacks.
func TestFields_complete(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range support.Fields() {
		assert.NotEmpty(t, f.Class, "%s is not in the table", f.Path)
		assert.False(t, seen[f.Path], "%s twice", f.Path)
		seen[f.Path] = true
		if f.Class == support.Refused {
			assert.NotEmpty(t, f.Note, "%s is refused without a reason", f.Path)
		}
	}
	for _, path := range []string{"spec.containers[].env[].valueFrom.secretKeyRef.name", "spec.volumes[].projected.sources[].configMap.items[].key"} {
		assert.True(t, seen[path], path)
	}
}

// TestCheck_everyField sets each field that is listed, one at a time, and
// wants an error exactly where the table refuses it.
func TestCheck_everyField(t *testing.T) {
	for _, f := range support.Fields() {
		var s corev1.PodSpec
		value := set(t, reflect.ValueOf(&s).Elem(), strings.Split(f.Path, ".")[1:], f)
		errs := support.Check(&s)
		if f.Class != support.Refused {
			assert.Empty(t, errs, "%s = %v", f.Path, value)
			continue
		}
		if assert.Len(t, errs, 1, f.Path) {
			assert.Equal(t, strings.ReplaceAll(f.Path, "[]", "[0]"), indexed(errs[0].Field, f.Path))
		}
	}
}

// indexed adds the index that an error about a whole list does not have.
func indexed(got, path string) string {
	if strings.HasSuffix(path, "[]") && !strings.HasSuffix(got, "]") {
		return got + "[0]"
	}
	return got
}

// set makes the field at path not empty, and returns what it set.
func set(t *testing.T, v reflect.Value, path []string, f support.Field) any {
	t.Helper()
	for v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if len(path) > 0 && v.Kind() == reflect.Struct {
		name := strings.TrimSuffix(path[0], "[]")
		for i := range v.NumField() {
			switch tag, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ","); tag {
			case name:
				inner := v.Field(i)
				if inner.Kind() == reflect.Slice {
					inner.Set(reflect.MakeSlice(inner.Type(), 1, 1))
					inner = inner.Index(0)
				}
				return set(t, inner, path[1:], f)
			case "":
				if _, ok := fieldNamed(v.Field(i).Type(), name); ok {
					return set(t, v.Field(i), path, f)
				}
			}
		}
		t.Fatalf("no field %s in %s", name, v.Type())
	}
	text := "1"
	if f.Class == support.Supported && len(f.Values) > 0 {
		text = f.Values[0]
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		// A refused flag that is harmless when true is refused when false.
		v.SetBool(len(f.Values) == 0 || f.Values[0] != "true")
	case reflect.Int32, reflect.Int64:
		v.SetInt(1)
	case reflect.Uint8:
		v.SetUint(1)
	case reflect.Map:
		require.NoError(t, json.Unmarshal([]byte(`{"`+text+`": "1"}`), v.Addr().Interface()))
	case reflect.Struct:
		if v.Type().String() == "resource.Quantity" {
			require.NoError(t, json.Unmarshal([]byte(`"1"`), v.Addr().Interface()))
		}
	default:
		t.Fatalf("%s has kind %s", f.Path, v.Kind())
	}
	return v.Interface()
}

func fieldNamed(t reflect.Type, name string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if tag, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); tag == name {
			return t.Field(i), true
		}
	}
	return reflect.StructField{}, false
}

// TestMarkdown_upToDate keeps the reference in step with the table.
func TestMarkdown_upToDate(t *testing.T) {
	if *update {
		require.NoError(t, os.MkdirAll("../../docs/reference", 0o755))
		require.NoError(t, os.WriteFile(reference, []byte(support.Markdown()), 0o644))
	}
	have, err := os.ReadFile(reference)
	require.NoError(t, err)
	assert.Equal(t, support.Markdown(), string(have), "run: go test ./shared/support -update")
}
