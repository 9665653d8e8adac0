{{/* Where a component keeps things, and how much of its node's disk that takes. */}}

{{/* Bytes of a quantity such as 10Gi. */}}
{{- define "veneer.bytes" -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- printf "%.0f" (mulf (float64 $number) (get $units (trimPrefix $number .))) -}}
{{- end -}}

{{/* The sum of a list of quantities. */}}
{{- define "veneer.sum" -}}
{{- $sum := 0.0 -}}
{{- range . -}}{{- $sum = addf $sum (include "veneer.bytes" . | float64) -}}{{- end -}}
{{- printf "%.0fMi" (ceil (divf $sum 1048576.0)) -}}
{{- end -}}

{{/* "true" if the adapters' content and catalog lie elsewhere, so that a registry's disk is a cache. */}}
{{- define "veneer.elsewhere" -}}
{{- if .Values.catalog.url -}}true{{- end -}}
{{- end -}}

{{/* "true" if the component owns a volume: a StatefulSet, one pod. */}}
{{- define "veneer.owns" -}}
{{- if eq .component "server" -}}true
{{- else if and (eq .component "registry") (not (include "veneer.elsewhere" .root)) -}}true
{{- end -}}
{{- end -}}

{{/* "true" if pods share a folder of bases. */}}
{{- define "veneer.sharedBases" -}}
{{- if or .Values.bases.claim .Values.bases.hostPath -}}true{{- end -}}
{{- end -}}

{{- define "veneer.cacheDir" -}}
{{- ternary "/var/cache/veneer" "/var/lib/veneer/cache" (eq (include "veneer.sharedBases" .) "true") -}}
{{- end -}}

{{/* Size of a pod's own disk: its caches, and 2 GiB for names, usage and what is just arriving. */}}
{{- define "veneer.dataSize" -}}
{{- $v := .root.Values -}}
{{- $parts := list "2Gi" -}}
{{- if eq .component "engine" -}}{{- $parts = append $parts $v.engine.adapterCache -}}
{{- else -}}{{- $parts = append (append $parts $v.store.cache) $v.registry.scratch -}}
{{- end -}}
{{- if not (include "veneer.sharedBases" .root) -}}{{- $parts = append $parts $v.bases.size -}}{{- end -}}
{{- include "veneer.sum" $parts -}}
{{- end -}}

{{/* Resources, with the node's disk that the pod may fill: its volumes there, and 1 GiB for logs. */}}
{{- define "veneer.resources" -}}
{{- $parts := list .root.Values.tmp "1Gi" -}}
{{- if not (include "veneer.owns" .) -}}{{- $parts = append $parts (include "veneer.dataSize" .) -}}{{- end -}}
{{- $disk := dict "ephemeral-storage" (include "veneer.sum" $parts) -}}
{{- $resources := deepCopy .values.resources -}}
{{- range $kind := list "requests" "limits" -}}
{{- $_ := set $resources $kind (merge (default dict (get $resources $kind)) $disk) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* The volumes of data and shared bases. */}}
{{- define "veneer.dataVolumes" -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir: {sizeLimit: {{ $v.tmp }}}
{{- if not (include "veneer.owns" .) }}
- name: data
  emptyDir: {sizeLimit: {{ include "veneer.dataSize" . }}}
{{- end }}
{{- if $v.bases.claim }}
- name: bases
  persistentVolumeClaim: {claimName: {{ $v.bases.claim | quote }}}
{{- else if $v.bases.hostPath }}
- name: bases
  hostPath: {path: {{ $v.bases.hostPath | quote }}, type: Directory}
{{- end }}
{{- end -}}

{{- define "veneer.dataMounts" -}}
- {name: data, mountPath: /var/lib/veneer}
- {name: tmp, mountPath: /tmp}
{{- if include "veneer.sharedBases" .root }}
- {name: bases, mountPath: /var/cache/veneer{{ if ne .root.Values.bases.prepare "pod" }}, readOnly: true{{ end }}}
{{- end }}
{{- end -}}

{{/* Variables of the server, the preparation included: those of the chart, then those of the values. */}}
{{- define "veneer.env" -}}
{{- $v := .root.Values -}}
{{- if include "veneer.sharedBases" .root }}
- {name: HF_HOME, value: /var/cache/veneer/huggingface}
{{- if and (ne $v.bases.prepare "pod") (ne .component "prepare") }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end }}
{{- if and $v.store.url (ne .component "prepare") }}
{{- if include "veneer.storeSecret" . }}
- {name: AWS_SHARED_CREDENTIALS_FILE, value: /run/secrets/store/credentials}
{{- end }}
{{- with $v.store.endpoint }}
- {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
{{- end }}
{{- with $v.store.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
{{- end }}
{{- if and $v.catalog.caSecret (ne .component "engine") }}
- {name: PGSSLROOTCERT, value: /run/secrets/catalog-ca/ca.crt}
{{- end }}
{{- end }}
{{- with $v.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "veneer.storeSecret" -}}
{{- $store := .root.Values.store -}}
{{- if eq .component "engine" -}}{{ default $store.credentialsSecret $store.readCredentialsSecret }}{{- else -}}{{ $store.credentialsSecret }}{{- end -}}
{{- end -}}

{{/* Secrets for catalog and store: name of the volume, and Secret. */}}
{{- define "veneer.storageSecrets" -}}
{{- $v := .root.Values -}}
{{- if $v.store.url }}
{{- with include "veneer.storeSecret" . }}
store: {{ . | quote }}
{{- end }}
{{- if ne .component "engine" }}
{{- with $v.catalog.passwordSecret }}
catalog: {{ . | quote }}
{{- end }}
{{- with $v.catalog.caSecret }}
catalog-ca: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Prepares the base in a shared folder, with the arguments of the component whose base it is. */}}
{{- define "veneer.prepare" -}}
{{- $v := .root.Values -}}
name: prepare
image: {{ include "veneer.image" .root }}
imagePullPolicy: {{ $v.image.pullPolicy }}
args:
  - model
  - prepare
  {{- include "veneer.args" . | trim | nindent 2 }}
env:
  {{- include "veneer.env" (dict "root" .root "component" "prepare") | trim | nindent 2 }}
resources:
  {{- include "veneer.resources" . | nindent 2 }}
securityContext:
  {{- include "veneer.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: data, mountPath: /var/lib/veneer}
  - {name: tmp, mountPath: /tmp}
  - {name: bases, mountPath: /var/cache/veneer}
  {{- with $v.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
