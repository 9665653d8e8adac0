{{/* Names, labels, and what is derived from several values. */}}

{{- define "veneer.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Room is left for "-registry-metrics" within the 63 characters of a Service's name. */}}
{{- define "veneer.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains (include "veneer.name" .) .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "veneer.name" .) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The component that answers generate calls. */}}
{{- define "veneer.serving" -}}
{{- ternary "engine" "server" (eq .Values.mode "replicated") -}}
{{- end -}}

{{/* The component that owns the adapters. */}}
{{- define "veneer.owner" -}}
{{- ternary "registry" "server" (eq .Values.mode "replicated") -}}
{{- end -}}

{{/* Name of the workload of a component. Argument: (dict "root" $ "component" "engine"). */}}
{{- define "veneer.workload" -}}
{{- $full := include "veneer.fullname" .root -}}
{{- if eq .component "server" -}}{{ $full }}{{- else -}}{{ printf "%s-%s" $full .component }}{{- end -}}
{{- end -}}

{{/* Labels that select the pods of a component; never changed after an installation. */}}
{{- define "veneer.selector" -}}
app.kubernetes.io/name: {{ include "veneer.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "veneer.labels" -}}
{{ include "veneer.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "veneer.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "veneer.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "veneer.keysSecret" -}}
{{- default (printf "%s-keys" (include "veneer.fullname" .)) .Values.keys.secret -}}
{{- end -}}

{{- define "veneer.tlsSecret" -}}
{{- default (printf "%s-tls" (include "veneer.fullname" .)) .Values.tls.secret -}}
{{- end -}}

{{/* A name in the server's certificate. */}}
{{- define "veneer.host" -}}
{{- printf "%s.%s.svc" (include "veneer.fullname" .) .Release.Namespace -}}
{{- end -}}

{{/* From the deletion of a pod to its end, at most; the rest is for stopping the engine. */}}
{{- define "veneer.terminationSeconds" -}}
{{- add .Values.drain.preStopSeconds .Values.drain.graceSeconds 15 -}}
{{- end -}}

{{/* "true" if the chart installs the endpoint picker. */}}
{{- define "veneer.ownPicker" -}}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.endpointPicker.name) -}}true{{- end -}}
{{- end -}}

{{- define "veneer.metricsNames" -}}
{{- ternary "vllm" .Values.metrics.names .Values.inferencePool.enabled -}}
{{- end -}}

{{/*
Flags of the server from a map: a list is repeated, true is --name. False is left out, since it is the
default of every switch but one.
*/}}
{{- define "veneer.flags" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
{{- if $value }}
- {{ printf "--%s" $name | quote }}
{{- else if eq $name "prefix-cache" }}
- "--no-prefix-cache"
{{- end }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "--%s=%v" $name . | quote }}
{{- end }}
{{- else if kindIs "float64" $value }}
{{- /* Helm reads every number as a float; a large whole one would be printed as 1e+06. */}}
- {{ printf "--%s=%s" $name (ternary (printf "%d" (int64 $value)) (toString $value) (eq (floor $value) $value)) | quote }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Values that exclude each other, with the way out. The schema has what concerns one value alone. */}}
{{- define "veneer.validate" -}}
{{- $v := .Values -}}
{{- if ne (empty $v.catalog.url) (empty $v.store.url) -}}
{{- fail (printf "%s is empty: catalog.url and store.url belong together, set both, or neither to keep adapters on a volume" (ternary "catalog.url" "store.url" (empty $v.catalog.url))) -}}
{{- end -}}
{{- if regexMatch "^[a-z]+://[^/@]*:[^/@]*@" $v.catalog.url -}}
{{- fail "catalog.url has a password, which would be in the release: put it into a Secret, and set catalog.passwordSecret" -}}
{{- end -}}
{{- if and (gt (int $v.registry.replicas) 1) (not $v.catalog.url) -}}
{{- fail (printf "registry.replicas is %d, but one volume has one owner: set catalog.url and store.url, or registry.replicas: 1" (int $v.registry.replicas)) -}}
{{- end -}}
{{- if and $v.bases.claim $v.bases.hostPath -}}
{{- fail "bases.claim and bases.hostPath are both set: remove one of them" -}}
{{- end -}}
{{- if and (eq $v.bases.prepare "job") (not $v.bases.claim) -}}
{{- fail "bases.prepare: job fills a claim that all pods share: set bases.claim, or bases.prepare: pod" -}}
{{- end -}}
{{- end -}}
